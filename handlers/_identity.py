"""Who calls a function, as far as AWS says it: from the event's context, which AWS writes, and never from a header.

HTTP API    requestContext.authorizer.jwt.claims.sub | .iam.userArn | .lambda        Function URLs: .iam
REST API    requestContext.authorizer.claims.sub | .principalId, requestContext.identity.userArn
direct      whoever IAM lets invoke the function

A load balancer's word stands in headers, which whoever reaches the function past it could write: it counts for nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

INVOKER: Final = "lambda:invoke"


def identity_of(event: Any) -> str | None:
    """`jwt:<sub>`, `iam:<arn>`, `authorizer:<principal>`, `lambda:invoke`; None where AWS vouches for nobody."""
    if not isinstance(event, dict) or "requestContext" not in event:
        return INVOKER
    context = _object(event.get("requestContext"))
    if "elb" in context:
        return None
    authorizer = _object(context.get("authorizer"))
    claims = _object(_object(authorizer.get("jwt")).get("claims")) or _object(authorizer.get("claims"))
    user = _text(_object(authorizer.get("iam")).get("userArn")) or _text(_object(context.get("identity")).get("userArn"))
    if subject := _text(claims.get("sub")) or _text(claims.get("client_id")):
        return f"jwt:{subject}"
    if user:
        return f"iam:{user}"
    own = authorizer.get("lambda")
    if principal := _text(authorizer.get("principalId")) or _text(_object(own).get("principalId")):
        return f"authorizer:{principal}"
    return "authorizer:unnamed" if isinstance(own, dict) else None  # it let the request through, and said nothing of who sent it


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
