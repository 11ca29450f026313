"""The API of the rendered template: who may call what, and where the call goes."""

from __future__ import annotations

import re

import pytest

from handlers._events import HttpApi
from tests.infra.template import PREDICTING, Template, alias_of, of_type, properties, references


@pytest.mark.parametrize("logical", PREDICTING)
def test_the_api_calls_the_provisioned_alias(prod: Template, logical: str) -> None:
    alias = alias_of(prod, logical)["Properties"]
    assert alias["Name"] == "provisioned"
    assert alias["ProvisionedConcurrencyConfig"] == {"ProvisionedConcurrentExecutions": 2}
    version = alias["FunctionVersion"]["Fn::GetAtt"][0]
    assert properties(prod, version)["FunctionName"] == alias["FunctionName"] == {"Ref": f"{logical}LambdaFunction"}
    called = {"Fn::Join": [":", [{"Fn::GetAtt": [f"{logical}LambdaFunction", "Arn"]}, "provisioned"]]}
    assert properties(prod, f"HttpApiIntegration{logical}")["IntegrationUri"] == called
    assert properties(prod, f"{logical}LambdaPermissionHttpApi")["FunctionName"] == called


def test_no_integration_goes_past_an_alias(prod: Template) -> None:
    integrations = of_type(prod, "AWS::ApiGatewayV2::Integration")
    assert set(integrations) == {f"HttpApiIntegration{logical}" for logical in PREDICTING}
    routes = {
        route["Properties"]["RouteKey"]: route["Properties"]["Target"]
        for route in of_type(prod, "AWS::ApiGatewayV2::Route").values()
    }
    assert {key: [name for name in references(target) if name in integrations] for key, target in routes.items()} == {
        "ANY /{proxy+}": ["HttpApiIntegrationPredict"],
        "ANY /v2/models/flight-delay": ["HttpApiIntegrationFlightDelay"],
        "ANY /v2/models/flight-delay/{rest+}": ["HttpApiIntegrationFlightDelay"],
    }


def matched(route_key: str, path: str) -> dict[str, str] | None:
    """The path parameters that API Gateway would send for a path of this route; None where the route is not the path's."""
    pattern = re.sub(r"\\\{(\w+)\\\+\\\}", r"(?P<\1>.+)", re.escape(route_key.partition(" ")[2]))
    found = re.fullmatch(pattern, path)
    return found and found.groupdict()


@pytest.mark.parametrize("stage", ["$default", "v1"])
def test_the_function_sees_the_path_that_was_asked_for(prod: Template, stage: str) -> None:
    asked = ["/v2/models/flight-delay", "/v2/models/flight-delay/infer", "/v2/models/flight-delay/versions/3/ready", "/ping"]
    tried = set()
    for key in (route["Properties"]["RouteKey"] for route in of_type(prod, "AWS::ApiGatewayV2::Route").values()):
        for path in asked:
            if (parameters := matched(key, path)) is None:
                continue
            tried.add(key)
            context = {"http": {"method": "POST", "path": path}, "stage": stage, "routeKey": key}
            raw = path if stage == "$default" else f"/{stage}{path}"
            event = {"version": "2.0", "routeKey": key, "rawPath": raw, "requestContext": context}
            if parameters:
                event["pathParameters"] = parameters
            assert HttpApi(event).request().path == path, key
    assert tried == {route["Properties"]["RouteKey"] for route in of_type(prod, "AWS::ApiGatewayV2::Route").values()}


def test_nobody_unknown_gets_in(prod: Template, dev: Template) -> None:
    for route in of_type(prod, "AWS::ApiGatewayV2::Route").values():
        assert route["Properties"]["AuthorizationType"] == "JWT"
        assert route["Properties"]["AuthorizerId"] == {"Ref": "HttpApiAuthorizerJwt"}
    jwt = properties(prod, "HttpApiAuthorizerJwt")
    assert jwt["JwtConfiguration"] == {"Audience": ["triform"], "Issuer": "https://issuer.example.com/"}
    assert {route["Properties"]["AuthorizationType"] for route in of_type(dev, "AWS::ApiGatewayV2::Route").values()} == {
        "AWS_IAM"
    }
    assert of_type(dev, "AWS::ApiGatewayV2::Authorizer") == {}


def test_the_api_is_throttled(prod: Template, dev: Template) -> None:
    told = {"DetailedMetricsEnabled": True, "ThrottlingRateLimit": 200, "ThrottlingBurstLimit": 400}
    assert properties(prod, "HttpApiStage")["DefaultRouteSettings"] == told
    assert properties(dev, "HttpApiStage")["DefaultRouteSettings"]["ThrottlingRateLimit"] == 10
