"""MONAI Label's web server, for this machine alone; runs in MONAI Label's environment.

Listening on the loopback interface keeps other machines out, but not the web pages that somebody opens on this one: a
request that a browser sends for a page of another origin is refused, and so is one that came by another host name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from monailabel.app import app
from monailabel.endpoints import infer
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

HOSTS = ["127.0.0.1", "localhost"]
ORIGINS = json.loads(os.environ["ALLOWED_ORIGINS"])


class RefuseOtherOrigins:
    """An ASGI layer that answers no page of an origin that is not allowed.

    Args:
        app: the next layer.
        allowed: origins such as ``http://localhost:3000``.
    """

    def __init__(self, app: Any, allowed: Sequence[str]) -> None:
        self.app = app
        self.allowed = allowed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        origin = Headers(scope=scope).get("origin") if scope["type"] in ("http", "websocket") else None
        if origin is None or origin in self.allowed:
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse(f"origin {origin} is not allowed: --allow_origin {origin} allows it", 403)(
                scope, receive, send
            )


def telling_what_is_wanted(run_inference: Callable[..., Any]) -> Callable[..., Any]:
    """``run_inference`` of MONAI Label, which tells the app in which format the mask is wanted: not all get all."""

    def run(
        tasks: Any, model: str, image: str, session_id: str, params: str, file: Any, label: Any, output: Any
    ) -> Any:
        params = json.dumps({**json.loads(params or "{}"), "wanted": output})
        return run_inference(tasks, model, image, session_id, params, file, label, output)

    return run


infer.run_inference = telling_what_is_wanted(infer.run_inference)
# in place of MONAI Label's own, which lets every page of the web ask; its setting for that breaks its training
app.user_middleware[:] = [
    Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS),
    Middleware(RefuseOtherOrigins, allowed=ORIGINS),
    Middleware(CORSMiddleware, allow_origins=ORIGINS, allow_methods=["*"], allow_headers=["*"]),
]
