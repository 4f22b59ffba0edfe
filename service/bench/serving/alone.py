"""Embedding alone, in a process of its own: what enrollment through a service is compared with.

    python -m service.bench.serving.alone CHECKPOINT DEVICE RUNTIME BATCH FOLDER

It decodes the folder's images, says so, waits for a line, embeds all of them as a service does that
has them at once, and says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from model.pixels import resize
from model.terminal import say
from service.bench.crops import decoded, image_files
from service.embedding.embedder import Embedder
from service.images.decode import Crop


class NotEmbedded(Exception):  # noqa: N818
    """A process that embeds has ended; the message says what it wrote last."""


def seconds_alone(
    processes: int, checkpoint: Path, embedder: Embedder, batch: int, folder: Path
) -> float:
    """Have so many processes embed the folder's images at the same time → until all are done.

    embedder: whose device and runtime they use. Raises NotEmbedded.
    """
    command = [sys.executable, "-m", __name__, str(checkpoint), embedder.device, embedder.runtime]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(batch), str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "CI": "true"},  # else OpenVINO sends telemetry
                    text=True,
                )
            )
            for _ in range(processes)
        ]
        for process in started:
            stack.callback(process.kill)
        for process in started:
            _expect("decoded", process)
        began = time.perf_counter()
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in started:
            _expect("embedded", process)
        return time.perf_counter() - began


def _expect(word: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if (line := process.stdout.readline().strip()) != word:
        raise NotEmbedded(f"a process that embeds alone has ended: {line or 'it says nothing'}")


def main(checkpoint: str, device: str, runtime: str, batch: str, folder: str) -> None:
    """Run as the module says."""
    embedder = Embedder(Path(checkpoint), device, runtime)  # type: ignore[arg-type]
    config = embedder.info.config
    crops = [
        replace(crop, image=resize(crop.image, *size))
        for size in [(config.input_height, config.input_width)]
        for crop in decoded(image_files(Path(folder)))
    ]
    size, streams = int(batch), embedder.backend.streams
    batches = [crops[start : start + size] for start in range(0, len(crops), size)]

    def embed_all(chosen: Sequence[Sequence[Crop]]) -> None:
        with ThreadPoolExecutor(streams) as threads:
            list(threads.map(embedder.embed, chosen))

    embed_all(batches[:streams])
    say("decoded")
    sys.stdin.readline()
    embed_all(batches)
    say("embedded")


if __name__ == "__main__":
    main(*sys.argv[1:])
