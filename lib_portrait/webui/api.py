"""Routes under /portrait: what may be asked for, what is there, which faces a picture has.

The panel does not use them; they are there where the host's own API is (``--api``, ``--nowebui``) and ask for the same
credentials (``--api-auth``).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from secrets import compare_digest
from typing import Any

from lib_portrait.checkpoints.registry import USES
from lib_portrait.errors import PortraitError
from lib_portrait.guidance.options import OPTIONS
from lib_portrait.methods.declarations import declarations
from lib_portrait.options import Option
from lib_portrait.request import Limits, Photo, json_schema, parse_request

# Beside the picture, a request has room for this many bytes.
BODY_MARGIN = 64 * 2**10
# A body this many times larger than allowed is not waited for.
PATIENCE = 8


def on_app_started(demo: Any, app: Any) -> None:
    """Adds the routes where the host has its API; the host's `on_app_started` callback."""
    from modules import shared

    if shared.cmd_opts.api or shared.cmd_opts.nowebui:
        add_routes(app, shared.cmd_opts.api_auth)


def add_routes(app: Any, api_auth: str | None = None) -> None:
    """Adds the routes to a FastAPI app. api_auth: "user:password,user:password" as the host's --api-auth, or None."""
    from fastapi import Depends, Request
    from fastapi.exceptions import HTTPException
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPBasic, HTTPBasicCredentials
    from starlette.concurrency import run_in_threadpool

    from lib_portrait.webui import instances

    accepted = credentials(api_auth)
    basic = HTTPBasic(auto_error=False)

    def authorised(request: Request, given: HTTPBasicCredentials | None = Depends(basic)) -> None:
        if given is None or not matches(accepted, given.username, given.password):
            raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    def route(path: str, method: str, answer: Callable[[Any], Awaitable[Any]], summary: str) -> None:
        async def endpoint(request: Request) -> JSONResponse:
            try:
                if method != "GET":
                    require_json(request)
                return JSONResponse(await answer(request))
            except PortraitError as error:
                return JSONResponse(error_json(error), status_code=error.status_code)

        # FastAPI resolves annotations by name in this module, where these names are not.
        endpoint.__annotations__ = {"request": Request}
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=None,
            summary=summary,
            tags=["Portrait"],
            dependencies=[Depends(authorised)] if accepted else [],
        )

    authorised.__annotations__ = {"request": Request, "given": HTTPBasicCredentials | None}

    async def schema(request: Any) -> Any:
        return json_schema(instances.limits())

    async def models(request: Any) -> Any:
        return await run_in_threadpool(lambda: list_models(instances.store()))

    async def methods(request: Any) -> Any:
        return list_methods()

    async def detect(request: Any) -> Any:
        limits = instances.limits()
        body = await read_json(request, limits.photo_bytes * 4 // 3 + BODY_MARGIN)
        return await run_in_threadpool(lambda: detect_faces(body, instances.faces(), limits))

    async def keep(request: Any) -> Any:
        limits = instances.limits()
        body = await read_json(request, limits.photo_bytes * 4 // 3 + BODY_MARGIN)
        return await run_in_threadpool(lambda: keep_photo(body, instances.remember, limits))

    async def drop(request: Any) -> Any:
        await run_in_threadpool(instances.drop_caches)
        return {"dropped": True}

    route("/portrait/schema", "GET", schema, "JSON Schema of a request")
    route("/portrait/methods", "GET", methods, "The methods there are, and their options")
    route("/portrait/models", "GET", models, "The weights there are, and what is missing")
    route("/portrait/detect", "POST", detect, "The faces in a picture")
    route("/portrait/photos", "POST", keep, "Keep a photo, to name it by hash in requests")
    route("/portrait/drop-caches", "POST", drop, "Forget photos, features and loaded weights")


# ------------------------------------------------------------------------------------------------------- credentials


def credentials(api_auth: str | None) -> dict[str, str]:
    """Password by user from the host's --api-auth (modules/api/api.py: Api.__init__); empty where there is none."""
    if not api_auth:
        return {}
    return dict(pair.split(":", 1) for pair in api_auth.split(","))


def matches(accepted: Mapping[str, str], user: str, password: str) -> bool:
    """Whether these credentials are among those accepted; takes as long for a wrong password as for a right one."""
    known = accepted.get(user)
    return known is not None and compare_digest(password.encode(), known.encode())


# ------------------------------------------------------------------------------------------------------------ answers


def error_json(error: PortraitError) -> dict[str, Any]:
    """An error as the host's own routes give it (`error`, `detail`), with the field at fault beside."""
    return {"error": type(error).__name__, "field": error.field, "detail": error.detail}


def list_methods() -> dict[str, Any]:
    """The methods, and by name the JSON Schema of what each lets one choose beside what all have in common, and of what
    reference guidance does."""

    def told(options: Sequence[Option]) -> dict[str, Any]:
        return {option.name: {"title": option.title, **option.schema()} for option in options}

    methods = [
        {
            "name": one.name,
            "title": one.title,
            "adapter": one.has_adapter,
            "options": told(one.options),
            "identity_options": told(one.identity_options),
            "mixes": one.mixes,
        }
        for one in declarations()
    ]
    return {"methods": methods, "default": methods[0]["name"], "guidance": told(OPTIONS)}


def list_models(store: Any) -> dict[str, Any]:
    """What a `Store` has: for each adapter its files and what is missing, for each role all files and the folders."""
    kits = []
    for kit in store.kits():
        kits.append(
            {
                "name": kit.name,
                "method": kit.method,
                "usable": kit.usable,
                "problem": kit.problem,
                "files": {role: path.name for role, path in kit.files.items()},
                "missing": [
                    {
                        "role": gap.role,
                        "file": gap.filename,
                        "folder": str(gap.folder),
                        "optional": gap.optional,
                        "source": gap.known.url if gap.known else None,
                        "remedy": gap.remedy(),
                    }
                    for gap in kit.missing
                ],
            }
        )
    uses = {part.role: part.use for files in store.methods for part in files.parts} | USES
    roles = {
        role: {
            "use": use,
            "files": [{"name": entry.name, "size": entry.size} for entry in store.list(role)],
            "folders": [str(folder) for folder in store.folders(role)],
        }
        for role, use in uses.items()
    }
    return {"checkpoints": kits, "roles": roles}


def detect_faces(body: Any, faces: Any, limits: Limits) -> dict[str, Any]:
    """The faces of ``{"image": ..., "aligned": false, "crops": false}``, counted as requests do.

    That is from the left of the picture as one sees it, bystanders last; the largest is one only where there is nobody
    else. Boxes are left, top, right, bottom, landmarks the eyes, nose and mouth corners as seen on the upright face,
    all in pixels of the picture as it was sent, upright by its EXIF data; "turn" is by how many degrees it had to be
    turned to the right for its people to stand upright, 0 but for pictures that lie or stand on their heads. "notices"
    are what a user should know of a face. Raises PortraitError for a body of another form and as `FaceService.find`
    does: no face is an error.
    """
    from lib_portrait.faces.service import largest

    form = _form(body, ("image", "aligned", "crops"))
    crops = form.get("crops", False)
    if not isinstance(crops, bool):
        raise PortraitError("crops", "it is neither true nor false", "Give true or false.")
    photo = faces.named(_photo({key: form[key] for key in ("image", "aligned") if key in form}, limits), "image")
    found = faces.find(photo, "image")
    first = largest(found)
    listed = []
    for index, one in enumerate(found):
        entry = {
            "index": index,
            "largest": index == first,
            "bystander": one.bystander,
            "turn": one.turn,
            "box": [round(float(edge), 2) for edge in one.face.box],
            "landmarks": [[round(float(x), 2), round(float(y), 2)] for x, y in one.face.landmarks],
            "score": round(float(one.face.score), 4),
            "notices": list(one.notices),
        }
        if crops:
            entry["crop"] = png_base64(one.crop)
        listed.append(entry)
    return {"sha256": photo.sha256, "faces": listed}


def keep_photo(body: Any, remember: Callable[[bytes], str], limits: Limits) -> dict[str, str]:
    """Keeps the photo of ``{"image": ...}`` once it is known to be one; its hash names it in later requests."""
    from lib_portrait.faces.images import decode_image

    form = _form(body, ("image",))
    photo = _photo(form, limits)
    if photo.data is None:
        raise PortraitError("image", "a hash is no photo", "Send the photo itself.")
    decode_image(photo.data, "image", limits)
    return {"image": f"sha256:{remember(photo.data)}"}


def _form(body: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise PortraitError("body", "it is no JSON object", f"Send an object with: {', '.join(known)}.")
    for key in body:
        if key not in known:
            raise PortraitError(str(key)[:200], "the key is not known", f"Known here: {', '.join(known)}.")
    return body


def _photo(form: Mapping[str, Any], limits: Limits) -> Photo:
    """A photo from the form that requests have it in, checked as there. Raises PortraitError."""
    try:
        return parse_request({"identities": [{"photos": [dict(form)]}]}, limits).identities[0].photos[0]
    except PortraitError as error:
        field = error.field.removeprefix("identities[0].photos[0]").lstrip(".") or "image"
        raise PortraitError(field, error.problem, error.remedy, error.status_code) from None


def png_base64(picture: Any) -> str:
    """A picture (H, W, 3) uint8 RGB as base64 of a PNG file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode("ascii")


def require_json(request: Any) -> None:
    """Raises PortraitError (415) unless a Starlette request says that its body is JSON.

    Pages of other sites can have a browser send what a plain form could, or a body of no stated type, here without
    asking; for JSON the browser asks first (CORS), and the host allows only the origins of its --cors-allow-origins.
    """
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise PortraitError(
            "Content-Type",
            f"{given[:60]!r} is not what is accepted here",
            "Send the request with the header Content-Type: application/json.",
            415,
        )


async def read_json(request: Any, limit: int) -> Any:
    """The JSON body of a Starlette request of at most `limit` bytes. Raises PortraitError (413, 422).

    What comes after the limit is thrown away, for a client that still sends does not read the answer; one that goes on
    and on is cut off.
    """
    received = bytearray()
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            received += chunk
        elif size > PATIENCE * limit:
            break
    if size > limit:
        raise PortraitError(
            "body", f"it is larger than {limit // 2**20} MiB", "Send a smaller file of this photo.", 413
        )
    try:
        return json.loads(bytes(received))
    except (ValueError, RecursionError):
        raise PortraitError("body", "it is not JSON", "Send a JSON object.") from None
