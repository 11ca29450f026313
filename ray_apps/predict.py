"""The application `ray_apps.predict:build_app`: one deployment whose replicas hold the models and answer requests themselves.

    HAProxy -> replica: asgi.py or grpc.py -> triform/http.py -> triform/service.py -> triform/batching.py -> triform/predictor.py

No request is handed on from one process to another. Each replica loads every model, in its own process.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any, Final

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig

from ray_apps.arguments import Arguments
from ray_apps.asgi import AsgiApp
from ray_apps.autoscaling import QUEUE
from ray_apps.environment import draining_seconds, missing
from ray_apps.grpc import OpenInference
from ray_apps.hosting import Hosted, host
from ray_apps.logs import log_as_json
from ray_apps.rollout import DEPLOYMENT, Reporter
from ray_apps.telemetry import Logged, RayTelemetry
from triform.errors import ConfigurationError
from triform.settings import Settings
from triform.telemetry import Telemetry

log = logging.getLogger(__name__)

POLICY: Final = "ray_apps.autoscaling:LoadPolicy"
LOOK_BACK: Final = 12.0  # seconds that a decision looks back: Serve wants more than the 10 between two reports of its own
HEALTH_MARGIN: Final = 5.0  # seconds for Serve's own part in a look at a replica
GRPC: Final = "ray_apps.messages.add_to_server"  # for Serve's grpc_options


class Predict(OpenInference):
    """A replica. Its constructor raises what makes a model unfit to be served, and then the version before it stays up."""

    async def __init__(self, arguments: Arguments, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        log_as_json()
        self.counted = RayTelemetry()
        telemetry: Telemetry = self.counted
        if arguments.log_requests != "none":
            telemetry = Logged(telemetry, arguments.log_requests)
        self.hosted: Hosted = await asyncio.to_thread(host, arguments, settings, telemetry)
        self.hosted.live.start()
        self.reporter = Reporter(self.hosted.surface.service.models, settings, arguments.rollout_window_s)
        self.reporter.start()
        self.surface = self.hosted.surface
        self.timeout = arguments.timeout_s

    def __serve_build_asgi_app__(self) -> AsgiApp:
        return AsgiApp(self.surface, timeout=self.timeout, tells_request_id=True, at_end=self._end)

    async def _end(self) -> None:
        await self.reporter.end()
        await self.hosted.drain()
        self.counted.tell()

    async def check_health(self) -> None:
        """Asked by Serve; what it raises takes the replica out of HAProxy, and three times in a row gets it replaced."""
        await self.hosted.health.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve, for the policy."""
        return {QUEUE: self.hosted.batched.waiting_seconds}

    async def leave(self) -> None:
        """The application is about to end: callers are told to go elsewhere, and answered as before."""
        self.surface.service.models.leaving = True


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application for `serve.run`, `serve deploy` and KubeRay. Raises `ConfigurationError`, which names the key at fault."""
    arguments = Arguments.of(args)
    settings = arguments.settings(os.environ)
    if off := missing(os.environ):
        log.warning("Serve will be slow: start Ray with %s in its environment, or use python -m ray_apps", " ".join(off))
    try:
        deployment = _deployment(arguments)
    except ValueError as error:  # what Ray alone knows of numbers and names
        raise ConfigurationError(f"args: {' '.join(str(error).split())}") from error
    return deployment.bind(arguments, settings)


def _deployment(arguments: Arguments) -> serve.Deployment:
    return serve.deployment(
        serve.ingress()(Predict),
        name=DEPLOYMENT,
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
