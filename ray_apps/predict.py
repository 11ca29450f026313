"""The application `ray_apps.predict:build_app`: one deployment whose replicas hold the models and answer requests themselves.

    HAProxy -> replica: asgi.py or grpc.py -> triform/http.py -> triform/service.py -> triform/batching.py -> triform/predictor.py

No request is handed on from one process to another. Each replica loads every model, in its own process; but for a canary that is
isolated (`canary`), whose tensors go over to a second deployment: hop.py, canary.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any, Final

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from ray_apps.arguments import Arguments
from ray_apps.asgi import AsgiApp
from ray_apps.canary import Canary, Deployed
from ray_apps.environment import GRPC_MESSAGE, draining_seconds, least_of_grpc, missing
from ray_apps.grpc import OpenInference
from ray_apps.hop import Hop
from ray_apps.hosting import host
from ray_apps.replica import Replica
from ray_apps.rollout import DEPLOYMENT, Reporter
from triform.batched import half_of
from triform.errors import ConfigurationError
from triform.settings import Settings

log = logging.getLogger(__name__)

POLICY: Final = "ray_apps.autoscaling:LoadPolicy"
LOOK_BACK: Final = 12.0  # seconds that a decision looks back: Serve wants more than the 10 between two reports of its own
HEALTH_MARGIN: Final = 5.0  # seconds for Serve's own part in a look at a replica
GRPC: Final = "ray_apps.messages.add_to_server"  # for Serve's grpc_options


class Predict(Replica, OpenInference):
    """A replica. Its constructor raises what makes a model unfit to be served, and then the version before it stays up.

    `canary`: the deployment of isolated canaries, where there is one.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, arguments: Arguments, settings: Settings, canary: DeploymentHandle[Any] | None = None
    ) -> None:
        telemetry = self.begin(arguments)
        isolated = arguments.canary
        most = half_of(arguments.max_ongoing_requests)
        self.hop = None if canary is None or isolated is None else Hop(Deployed(canary), isolated.timeout_s, most)
        self.hosted = await asyncio.to_thread(host, arguments, settings, telemetry, self.hop)
        self.hosted.live.start()
        self.reporter = Reporter(self.hosted.surface.service.models, settings, arguments.rollout_window_s)
        self.reporter.start()
        self.surface = self.hosted.surface
        self.timeout, self.room = arguments.timeout_s, arguments.room()
        if self.hop is not None:
            self.hop.start(self.surface.service.models)

    def __serve_build_asgi_app__(self) -> AsgiApp:
        return AsgiApp(self.surface, timeout=self.timeout, room=self.room, tells_request_id=True, at_end=self._end)

    async def _end(self) -> None:
        await self.reporter.end()
        if self.hop is not None:
            await self.hop.end()
        await self.hosted.drain()
        self.counted.tell()

    async def leave(self) -> None:
        """The application is about to end: callers are told to go elsewhere, and answered as before."""
        self.surface.service.models.leaving = True


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application for `serve.run`, `serve deploy` and KubeRay. Raises `ConfigurationError`, which names the key at fault."""
    arguments = Arguments.of(args)
    settings = arguments.settings(os.environ)
    isolated = arguments.isolated()
    if off := missing(os.environ, hop=isolated is not None):
        log.warning("Serve will be slow: start Ray with %s in its environment, or use python -m ray_apps", " ".join(off))
    least = least_of_grpc(arguments)
    if int(os.environ.get(GRPC_MESSAGE) or least) < least:
        log.warning("gRPC takes less in a message than HTTP in a body: start Ray with %s=%d", GRPC_MESSAGE, least)
    deployment = _deployment(serve.ingress()(Predict), DEPLOYMENT, arguments, "args: ")
    if isolated is None:
        return deployment.bind(arguments, settings)
    canary = _deployment(Canary, "canary", isolated, "args: canary: ")
    return deployment.bind(arguments, settings, canary.bind(isolated, isolated.settings_of_models(os.environ)))


def _deployment(replica: type, name: str, arguments: Arguments, args: str) -> serve.Deployment:
    """`args`: how errors begin."""
    try:
        return serve.deployment(replica, name=name, **_options(arguments))
    except ValueError as error:  # what Ray alone knows of numbers and names
        raise ConfigurationError(f"{args}{' '.join(str(error).split())}") from error


def _options(arguments: Arguments) -> dict[str, Any]:
    return dict(
        **_scale(arguments),
        max_ongoing_requests=arguments.max_ongoing_requests,
        max_queued_requests=arguments.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=arguments.health_period_s,
        health_check_timeout_s=arguments.health_timeout_s + HEALTH_MARGIN,
        graceful_shutdown_timeout_s=draining_seconds(os.environ) + arguments.drain_s,
        graceful_shutdown_wait_loop_s=min(arguments.drain_s, 0.5),
        ray_actor_options=arguments.ray_actor_options(),
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),  # its access log is made even if off
    )


def _scale(arguments: Arguments) -> dict[str, Any]:
    scaling = arguments.autoscaling
    if scaling is None:
        return {"num_replicas": arguments.num_replicas or 1}
    policy = {"policy_function": POLICY, "policy_kwargs": {"target_queue_s": scaling.target_queue_s}}
    config = AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        initial_replicas=max(1, scaling.min_replicas),  # one that does not start is told of by the deployment, not by a caller
        max_replicas=scaling.max_replicas,
        target_ongoing_requests=scaling.target_ongoing_requests,
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        downscale_to_zero_delay_s=scaling.to_zero_delay_s,
        look_back_period_s=LOOK_BACK,
        policy=AutoscalingPolicy(**policy),
    )
    return {"autoscaling_config": config}
