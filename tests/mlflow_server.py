"""A small tracking server that speaks as much of MLflow's protocol as the bundle needs, and can die."""

import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

API = "/api/2.0/mlflow/"
FILES = "/api/2.0/mlflow-artifacts/artifacts/"


class Server:
    """Keeps runs while it is away.

    Attributes:
        runs: by id, as MLflow's JSON has them, with names of files under `files`.
        hangs: take requests and never answer.
        loses_files: has no place for them at present.
        refuses: names of endpoints that answer that a parameter is invalid.
    """

    def __init__(self):
        self.runs = {}
        self.experiments = {}
        self.hangs = threading.Event()
        self.refuses = set()
        self.loses_files = False
        self.http = None
        self.port = 0

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self.http.daemon_threads = True
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, method, path, body, query):
        if path.startswith(FILES):
            if self.loses_files:
                raise ValueError("TEMPORARILY_UNAVAILABLE")
            run = self.runs[path.removeprefix(FILES).split("/")[0]]
            run["files"].append(path.partition("/artifacts/artifacts/")[2].partition("/")[2])
            return {}
        return getattr(self, path.removeprefix(API).replace("/", "_").replace("-", "_"))(body, query)

    def experiments_get_by_name(self, body, query):
        return {"experiment": self.experiments[query["experiment_name"][0]]}

    def experiments_create(self, body, query):
        self.experiments[body["name"]] = {
            "experiment_id": "1",
            "name": body["name"],
            "lifecycle_stage": "active",
            "artifact_location": "mlflow-artifacts:/",
        }
        return {"experiment_id": "1"}

    def runs_create(self, body, query):
        number = uuid.uuid4().hex  # MLflow remembers where runs keep their files
        info = {
            "run_id": number,
            "run_uuid": number,
            "run_name": body["run_name"],
            "experiment_id": "1",
            "status": "RUNNING",
            "start_time": body["start_time"],
            "artifact_uri": f"{self.uri}{FILES}{number}",
            "lifecycle_stage": "active",
        }
        self.runs[number] = {"info": info, "data": {"tags": body["tags"], "metrics": [], "params": []}, "files": []}
        return {"run": self.runs[number]}

    def runs_get(self, body, query):
        return {"run": self.runs[query["run_id"][0]]}

    def runs_search(self, body, query):
        key, _, value = body.get("filter", "").partition(" = ")
        name = {"attributes.run_name": "run_name", "attributes.status": "status"}[key]
        return {"runs": [run for run in self.runs.values() if run["info"][name] == value.strip("'")]}

    def runs_log_batch(self, body, query):
        data = self.runs[body["run_id"]]["data"]
        data["metrics"] += body.get("metrics", [])
        data["params"] += body.get("params", [])
        return {}

    def runs_update(self, body, query):
        self.runs[body["run_id"]]["info"]["status"] = body["status"]
        return {"run_info": self.runs[body["run_id"]]["info"]}


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def serve(self):
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            url = urlsplit(self.path)
            if server.hangs.is_set():
                threading.Event().wait(60)
                return
            try:
                body = {} if url.path.startswith(FILES) else json.loads(content or b"{}")
                if url.path.removeprefix(API) in server.refuses:
                    raise ValueError("INVALID_PARAMETER_VALUE")
                status, answer = 200, server.answer(self.command, url.path, body, parse_qs(url.query))
            except ValueError as error:
                status, answer = (
                    503 if "UNAVAILABLE" in str(error) else 400,
                    {"error_code": str(error), "message": "not so"},
                )
            except (KeyError, AttributeError) as error:
                status, answer = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": str(error)}
            text = json.dumps({key: value for key, value in answer.items() if key != "files"}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_PATCH = serve  # noqa: N815

    return Handler
