"""The deployment of isolated canaries: its replicas follow the releases and hold what has the alias `canary`, nothing else.

    ray_apps/predict.py -> hop.py -> Deployed -> Serve's handle -> Canary.run -> triform/batching.py -> triform/predictor.py

So a canary has processes, CPUs, a share of a GPU and autoscaling of its own: what it breaks or keeps busy is not stable's, nor
what it eats, as long as its node has it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ray_apps.arguments import Arguments
from ray_apps.autoscaling import NEEDED
from ray_apps.hop import Done, Failed
from ray_apps.hosting import host_canaries
from ray_apps.replica import Replica
from triform.errors import NotFound, NotReady, Overloaded, TriformError, Unavailable
from triform.settings import Settings
from triform.signature import Array

log = logging.getLogger(__name__)


class Canary(Replica):
    """A replica. It starts whatever becomes of a canary, and without one."""

    async def __init__(self, arguments: Arguments, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        telemetry = self.begin(arguments)
        self.hosted = await asyncio.to_thread(host_canaries, arguments, settings, telemetry)
        self.hosted.live.start()

    async def run(self, model: str, version: int, inputs: Mapping[str, Array], seconds: float) -> Done | Failed:
        """As `hop.Replicas`."""
        began = time.perf_counter()
        try:
            served = self.hosted.models.get(model, version=version)
            ran = await self.hosted.batched(served, inputs, time.monotonic() + seconds)
            return Done(ran, time.perf_counter() - began)
        except NotFound:
            return Failed.of(NotReady(f"{model}/{version} is not loaded here, or not any more: send the request again later"))
        except TriformError as error:
            return Failed.of(error)
        except Exception:
            log.exception("%s/%d failed", model, version)
            return Failed.of(TriformError("the canary's replica failed; its log knows why"))

    async def look(self) -> dict[str, Failed | None]:
        """As `hop.Replicas`."""
        said: dict[str, Failed | None] = {predictor.manifest.ref: None for predictor in self.hosted.models.predictors()}
        for model, version, error in await asyncio.to_thread(self._refused):
            said[f"{model}/{version}"] = Failed.of(error)
        return said

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """As every replica; one stays while a release has a canary."""
        return {**await super().record_autoscaling_stats(), NEEDED: float(bool(self.hosted.models.names()))}

    def _refused(self) -> list[tuple[str, int, TriformError]]:
        return [(f.ref.model, *why) for f in self.hosted.followers if (why := f.why_not()) is not None]


class Deployed:
    """The replicas of a deployment of `Canary`, by Serve's handle: `hop.Replicas`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def run(self, model: str, version: int, inputs: Mapping[str, Array], seconds: float) -> Done | Failed:
        said: Done | Failed = await self._call(self._run, model, version, inputs, seconds)
        return said

    async def look(self) -> dict[str, Failed | None]:
        said: dict[str, Failed | None] = await self._call(self._look)
        return said

    @cached_property  # made on the event loop: Serve has no other for it
    def _run(self) -> Any:
        return self._handle.options(method_name="run", request_serialization="pickle", response_serialization="pickle")

    @cached_property
    def _look(self) -> Any:
        return self._handle.options(method_name="look")

    async def _call(self, method: Any, *args: Any) -> Any:
        try:
            return await method.remote(*args)
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            raise Unavailable("the call of the canary was broken off: send the request again") from error  # by gRPC, not by us
        except BackPressureError as error:
            raise Overloaded("too much waits for the canary: send the request again later") from error
        except (RayActorError, DeploymentUnavailableError) as error:
            raise Unavailable("the canary's process is not there, or went away: send the request again") from error
        except Exception as error:  # Ray and gRPC have dozens of unrelated classes
            raise TriformError("the call of the canary failed; the log knows why") from error
