"""Look at results in OHIF, a viewer that hospitals use, on this machine alone.

python -m scripts.integrations.viewer RESULTS

The folder of results names its inputs, so that the viewer shows both. Any other folder of DICOM files may stand in its
place, or the DICOMweb address of an archive.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import requests
from aiohttp import BasicAuth, ClientError, ClientSession, ClientTimeout, web
from filelock import FileLock
from pydicom.misc import is_dicom
from tqdm import tqdm

from bundle import NAME
from bundle.errors import BundleError
from bundle.files import partial_prefix
from bundle.manifest import FILE, Manifest
from bundle.servers import HOST, free_ports, until_interrupted
from scripts.integrations.dicomweb import TIMEOUT, connect
from scripts.integrations.environments import cache_folder
from scripts.integrations.orthanc import Orthanc, running

VERSION = "3.13.2"  # of OHIF
PACKAGE = f"https://registry.npmjs.org/@ohif/app/-/app-{VERSION}.tgz"
SHA512 = (
    "5997719a9986eeba85816f5924b71b82bdd70ad2e2d4a0cd3e831a798e4f3dee"
    "a3e06e1f8c48e393271933a0ba664d85f3b04ac457e9abe8dde715d907d13c10"
)
LICENSE = "MIT"
IN_PACKAGE = "package/dist"  # the built viewer
PORT = 3000
DICOMWEB = "/dicom-web"
# without these two a browser gives no shared memory to the page, which OHIF decodes into
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
ASKED = ("Accept", "Accept-Encoding")  # headers that the archive gets, and
ANSWERED = ("Content-Type", "Content-Encoding")  # those that come back
START_SECONDS = 30.0
T = TypeVar("T")
SESSION = web.AppKey("session", ClientSession)


def ohif(base: Path, package: Path | None = None) -> Path:
    """The folder of the built viewer below ``base``; fetched once, and only if its hash is the known one.

    Args:
        base: where it belongs.
        package: the file of the package, where the machine cannot fetch it; None: from the npm registry.

    Raises:
        BundleError: if it cannot be fetched, or is another one.
    """
    folder = base / f"ohif-{VERSION}"
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            archive = _fetched(folder) if package is None else _given(package)
            with tempfile.TemporaryDirectory(dir=base, prefix=partial_prefix()) as workspace:
                with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
                    opened.extractall(workspace, filter="data")
                Path(workspace, IN_PACKAGE).rename(folder)
    return folder


def _fetched(folder: Path) -> bytes:
    print(f"fetching OHIF {VERSION} ({LICENSE} license, 50 MB) into '{folder}', once", flush=True)
    try:
        answer = requests.get(PACKAGE, timeout=60)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise BundleError(
            f"cannot fetch '{PACKAGE}' ({type(error).__name__}): fetch it elsewhere, and give --package FILE"
        ) from error
    return _checked(answer.content, PACKAGE)


def _given(package: Path) -> bytes:
    try:
        return _checked(package.read_bytes(), str(package))
    except OSError as error:
        raise BundleError(f"cannot read '{package}' ({error.strerror}): check --package") from error


def _checked(archive: bytes, source: str) -> bytes:
    found = hashlib.sha512(archive).hexdigest()
    if found != SHA512:
        raise BundleError(
            f"'{source}' is not OHIF {VERSION} (sha512 {found[:16]}..., not {SHA512[:16]}...): fetch it anew"
        )
    return archive


def settings() -> str:
    """The file ``app-config.js`` of OHIF: one source, on the viewer's own address."""
    source = {
        "friendlyName": NAME,
        "qidoRoot": DICOMWEB,
        "wadoRoot": DICOMWEB,
        "wadoUriRoot": DICOMWEB,
        "imageRendering": "wadors",
        "thumbnailRendering": "wadors",
        "qidoSupportsIncludeField": False,
        "supportsFuzzyMatching": False,
        "supportsWildcard": True,
        "enableStudyLazyLoad": True,
        "omitQuotationForMultipartRequest": True,
        "bulkDataURI": {"enabled": False},
    }
    named = {
        "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
        "sourceName": NAME,
        "configuration": source,
    }
    return "window.config = " + json.dumps(
        {
            "routerBasename": None,
            "extensions": [],
            "modes": [],
            # an overlay is no film to play, and who looks at results wants no tour of the viewer first
            "customizationService": {"autoCineModalities": {"$set": []}, "ohif.tours": {"$set": []}},
            "showStudyList": True,
            "maxNumberOfWebWorkers": 2,
            "defaultDataSourceName": NAME,
            "dataSources": [named],
            "investigationalUseDialog": {"option": "always"},
        }
    )


def application(viewer: Path, archive: str, auth: BasicAuth | None = None) -> web.Application:
    """A server of the files in ``viewer``, and of what a DICOMweb server says; it only reads.

    Args:
        viewer: of :func:`ohif`.
        archive: address of the DICOMweb server.
        auth: name and password for it.
    """

    async def read_archive(request: web.Request) -> web.StreamResponse:
        rest = request.match_info["rest"]
        if ".." in rest.split("/"):  # which would lead out of what the archive offers by DICOMweb
            raise web.HTTPNotFound(text="no such path")
        asked = {name: request.headers[name] for name in ASKED if name in request.headers}
        try:
            answer = await request.app[SESSION].get(f"{archive}/{rest}", params=request.query, headers=asked)
        except ClientError as error:
            raise web.HTTPBadGateway(text=f"no answer of the archive ({type(error).__name__})") from error
        async with answer:
            answered = {name: answer.headers[name] for name in ANSWERED if name in answer.headers}
            response = web.StreamResponse(status=answer.status, headers=answered | HEADERS)
            await response.prepare(request)
            async for part in answer.content.iter_any():
                await response.write(part)
            return response

    async def read_settings(request: web.Request) -> web.Response:
        return web.Response(text=settings(), content_type="text/javascript", headers=HEADERS)

    async def read_file(request: web.Request) -> web.StreamResponse:
        file = (viewer / request.match_info["rest"]).resolve()
        is_file = file.is_relative_to(viewer.resolve()) and file.is_file()
        # any other path is one of the viewer's pages, which its script tells apart
        return web.FileResponse(file if is_file else viewer / "index.html", headers=HEADERS)

    @web.middleware
    async def for_this_machine(request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        # a page of another site may have a name that leads here: its host tells
        if request.host.rpartition(":")[0] not in (HOST, "localhost"):
            raise web.HTTPForbidden(text=f"ask as {HOST}")
        return await handler(request)

    async def session(app: web.Application) -> Any:
        options: dict[str, Any] = {"auto_decompress": False, "skip_auto_headers": ["Accept-Encoding"]}
        async with ClientSession(auth=auth, timeout=ClientTimeout(total=TIMEOUT), **options) as opened:
            app[SESSION] = opened
            yield

    app = web.Application(middlewares=[for_this_machine])
    app.cleanup_ctx.append(session)
    app.router.add_get(DICOMWEB + "/{rest:.*}", read_archive)
    app.router.add_get("/app-config.js", read_settings)
    app.router.add_get("/{rest:.*}", read_file)
    return app


@contextmanager
def serving(app: web.Application, port: int) -> Iterator[str]:
    """The address of ``app``, which answers this machine alone until the block ends."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, daemon=True)

    def done(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(START_SECONDS)

    async def serve() -> web.AppRunner:
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, HOST, port).start()
        return runner

    thread.start()
    runner = done(serve())
    try:
        yield f"http://{HOST}:{port}"
    finally:
        done(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(START_SECONDS)
        loop.close()


def dicom_files(folders: Sequence[Path]) -> list[Path]:
    """The DICOM files below ``folders``, and those of the inputs that a folder of results names."""
    places = list(folders)
    for folder in folders:
        if not folder.exists():
            raise BundleError(f"no folder '{folder}': check the path")
        if (folder / FILE).is_file():
            places += [Path(entry.source) for entry in Manifest(folder).entries.values() if entry.source]
    files = {file.resolve(): None for place in places for file in sorted([place, *place.rglob("*")]) if file.is_file()}
    return [file for file in files if is_dicom(file)]


def store(server: Orthanc, files: Sequence[Path]) -> None:
    """Store ``files`` on an Orthanc."""
    for file in tqdm(files, "storing", unit="file", leave=False):
        answer = requests.post(f"{server.http_url}/instances", file.read_bytes(), timeout=60)
        if not answer.ok:
            raise BundleError(f"Orthanc does not take '{file}' (status {answer.status_code}): check the file")


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description="OHIF for results on this machine; only this machine can reach it.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of results, or of DICOM files")
    parser.add_argument(
        "--url", help="show the DICOMweb archive at this address, such as http://127.0.0.1:8042/dicom-web"
    )
    parser.add_argument("--allow_remote", action="store_true", help="the archive may be on another machine")
    parser.add_argument("--port", type=int, default=PORT, help=f"0: any free one (default: {PORT})")
    parser.add_argument("--package", type=Path, help=f"the file {PACKAGE}, where it cannot be fetched")
    return parser


@contextmanager
def viewing(
    folders: Sequence[Path] = (),
    url: str | None = None,
    allow_remote: bool = False,
    port: int = PORT,
    package: Path | None = None,
) -> Iterator[str]:
    """The address of the viewer, until the block ends."""
    if bool(folders) == bool(url):
        raise BundleError("nothing to show, or two things: give a FOLDER, or --url")
    with ExitStack() as stack:
        viewer = ohif(cache_folder(), package)
        auth = None
        if url:
            archive = connect(url, allow_remote).base_url
            if known := requests.utils.get_netrc_auth(url):
                auth = BasicAuth(*known)
        else:
            files = dicom_files(folders)
            if not files:
                named = ", ".join(f"'{folder}'" for folder in folders)
                raise BundleError(f"no DICOM file in {named}: infer with --write_dicom true")
            server = stack.enter_context(running())
            store(server, files)
            archive = server.dicomweb_url
        yield stack.enter_context(serving(application(viewer, archive, auth), **free_ports(port=port)))


def main() -> None:
    """Run until Ctrl-C."""
    until_interrupted(viewing(**vars(make_parser().parse_args())), "OHIF  {}".format)


if __name__ == "__main__":
    main()
