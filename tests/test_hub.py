"""Hub: what is checked of a name on the hub is what is loaded; a server on this machine stands for the hub."""

import hashlib
import json
import re
import shutil
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import FAMILY_CONFIGS, make_mask, make_model, told_by_a_stranger

from loraprune.export import export_model
from loraprune.forms import CODE_FILE
from loraprune.groups import find_groups

READER = """
import json, sys
import loraprune
from loraprune.errors import UserError
told = {}
for revision in sys.argv[2:]:
    try:
        model = loraprune.load_pruned("someone/pruned", **({} if revision == "none" else {"revision": revision}))
        told[revision] = [type(model).__name__, model.num_parameters()]
    except UserError as error:
        told[revision] = error.what
print(json.dumps(told))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves the files of each revision of one repository: a folder named as the revision."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        super().__init__(*arguments)

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        found = re.fullmatch(r"/someone/pruned/resolve/([^/]+)/(.+)", self.path)
        path = self.folder / found[1] / found[2] if found else None
        if path is None or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = whole = path.read_bytes()
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            content = whole[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", hashlib.sha1(found[1].encode()).hexdigest())
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub with the repository someone/pruned, and the folder of its revisions."""
    folder = tmp_path / "revisions"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder))
    Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_revision_that_is_checked_is_the_one_that_is_loaded(hub, tokenizer, tmp_path):
    folder, address = hub
    model = make_model(FAMILY_CONFIGS["llama_gqa"]())
    groups = find_groups(model, model.config)
    uneven = make_mask(groups, {"kv_group": [[0], [1, 2]], "ffn_channel": [[0, 9], [1, 2, 3, 4, 5]]})
    export_model(model, tokenizer, groups, uneven, folder / "good")
    shutil.copytree(folder / "good", folder / "foreign")
    (folder / "foreign" / CODE_FILE.name).write_text("raise SystemExit\n")
    shutil.copytree(folder / "good", folder / "main")
    config = json.loads((folder / "main" / "config.json").read_text())
    config["per_layer_config"]["0"]["intermediate_size"] += 1
    (folder / "main" / "config.json").write_text(json.dumps(config))
    quiet = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    told = told_by_a_stranger(READER, tmp_path, ["good", "foreign", "none"], **quiet)
    assert told["good"] == ["PerLayerLlamaForCausalLM", groups.total_parameters - uneven.removed_parameters(groups)]
    assert told["foreign"].startswith(f"{CODE_FILE.name} of someone/pruned is not the file")
    assert "mlp" in told["none"]  # the newest, whose config contradicts its weights
