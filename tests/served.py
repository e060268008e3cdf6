"""`meshway serve` in a process of its own, and clients of it."""

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import openai
from running import start


@contextlib.contextmanager
def serving(run: Path, *words: str) -> Iterator[SimpleNamespace]:
    """Starts a server on a free port; it is stopped, and what it says is in `said`."""
    process = start("serve", f"--model_dir={run}", "--port=0", "--gin.LAYOUT=single", *words)
    said: list[str] = []
    found = threading.Event()

    def listen():
        for line in process.stdout:
            said.append(line)
            if "serving at" in line:
                found.set()
        found.set()

    reader = threading.Thread(target=listen, daemon=True)
    reader.start()
    try:
        assert found.wait(900) and process.poll() is None, "".join(said)
        url = re.search(r"serving at (\S+)", "".join(said))[1]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with httpx2.Client(base_url=url, timeout=60) as http:
            yield SimpleNamespace(process=process, url=url, client=client, http=http, said=said, reader=reader)
    finally:
        process.kill()
        process.wait(20)
        reader.join(20)
