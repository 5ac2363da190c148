"""A server under load: its process, its clients, its killers, and what they found."""

import argparse
import asyncio
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from signal import SIGKILL, SIGTERM
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx
import psutil
import torch
from PIL import Image

from storyadapter import api
from storyadapter.bench.environment import describe
from storyadapter.bench.kills import actors_of
from storyadapter.bench.report import table
from storyadapter.bench.throughput.inputs import prompts
from storyadapter.checkpoint import Checkpoint, CheckpointPaths
from storyadapter.demo.shipped import MODEL
from storyadapter.method import constants
from storyadapter.method.errors import RunError
from storyadapter.method.events import FrameFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.runtime.psnr import MIN_PSNR, psnr

KIND: Final = "serve"
_CANCELLED: Final = 0.1  # share of stories
_VANISHING: Final = 0.1  # share of readers that go away in the middle, and come again
_SLOW: Final = 0.1  # share of readers that wait after each event
_COMPARED: Final = 8  # stories whose pictures are drawn again by `run`
# dB in fp32 of the text-only iteration, as frames of other stories stood beside them in a call, and of later ones,
# whose references differ by as much
_AT_LEAST: Final = (80.0, 60.0)
_GROWTH: Final = 1.1  # of the memory of a server's last life, from its second quarter to its last
_ENDS: Final = ("completed", "failed", "cancelled")


@dataclass
class Sent:
    """A story that was accepted; seconds since the load began."""

    name: str
    asked: dict[str, Any]
    accepted: float
    posted: float  # seconds that the answer took
    first: float | None = None  # when its first frame was told
    ended: float | None = None
    state: str = ""
    events: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class ServeReport:
    """What was measured; `seconds` by name and percentile, `memory` in bytes over time, by life of the server,
    `worst_psnr` in dB by iteration."""

    environment: dict[str, str]
    load: dict[str, Any]
    seconds: float
    outcomes: dict[str, int]
    frames: int  # drawn
    redrawn: int  # frames that were told more than once
    latencies: dict[str, dict[str, float]]
    memory: list[list[int]]
    kills: int
    worker_kills: int
    worst_psnr: list[float]
    problems: list[str]


class Server:
    """The program in a process of its own, on one port and one folder whenever it is started."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self._words = [sys.executable, "-m", "storyadapter", "serve", *words, "--data", str(folder), "--json-log"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._words, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def workers(self) -> list[psutil.Process]:
        """Its Ray actors."""
        assert self._process is not None
        return actors_of(self._process.pid)

    def memory(self) -> int:
        """Bytes, resident; 0 where it was just killed."""
        try:
            return psutil.Process(self._process.pid).memory_info().rss if self._process else 0
        except psutil.NoSuchProcess:
            return 0

    def check(self) -> None:
        """Raises RunError: it has ended by itself."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise RunError(f"the server ended with exit code {code}")

    def stop(self) -> int:
        """End it in good order; its exit code."""
        assert self._process is not None
        self._process.send_signal(SIGTERM)
        return self._process.wait(60)


class Load:
    """The clients, and what they saw."""

    def __init__(self, args: argparse.Namespace, server: Server, client: httpx.AsyncClient) -> None:
        self.args = args
        self.random = Random(args.seed)
        self.sent: list[Sent] = []
        self.memory: list[list[int]] = [[]]  # of each life
        self.killed = self.killed_workers = 0
        self._server = server
        self._client = client
        self.started = time.monotonic()

    @property
    def now(self) -> float:
        return time.monotonic() - self.started

    async def run(self) -> float:
        """Returns the seconds until the last story ended."""
        killing = asyncio.create_task(self._kill())
        args, gate = self.args, asyncio.Semaphore(self.args.clients)

        async def one(number: int, at: float) -> None:
            await asyncio.sleep(at)
            async with gate:
                await self._story(number)

        at, tasks = 0.0, []
        for number in range(args.stories):
            at += self.random.expovariate(args.rate) if args.rate else 0.0
            tasks.append(asyncio.create_task(one(number, at)))
        try:
            await asyncio.gather(*tasks)
        finally:
            killing.cancel()
        return self.now

    async def ready(self) -> None:
        """Wait until the server draws."""
        while True:
            self._server.check()
            try:
                if (await self._client.get("/readyz")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.1)

    async def _story(self, number: int) -> None:
        asked = {
            "prompts": prompts(self.args.frames)[: self.random.randint(1, self.args.frames)],
            "priority": self.random.choice(("interactive", "batch")),
            "settings": {"steps": self.args.steps, "iterations": self.args.iterations, "seed": number},
        }
        began, headers = self.now, {"Idempotency-Key": f"load-{number}"}
        # an answer that is lost with the server is asked for again, by the same key
        answer = await self._again(lambda: self._client.post("/v1/stories", json=asked, headers=headers))
        sent = Sent(answer.json()["id"], asked, began, self.now - began)
        self.sent.append(sent)
        if self.random.random() < _CANCELLED:
            await asyncio.sleep(self.random.uniform(0, 2))
            await self._again(lambda: self._client.delete(f"/v1/stories/{sent.name}"))
        slow, vanishes = self.random.random() < _SLOW, self.random.random() < _VANISHING
        while sent.state not in _ENDS:
            try:
                await self._read(sent, pause=0.2 if slow else 0.0, most=3 if vanishes else None)
            except httpx.HTTPError:
                await asyncio.sleep(0.2)
            vanishes = False
        sent.ended = self.now

    async def _again(self, call: Any) -> httpx.Response:
        while True:
            try:
                answer = await call()
                if answer.status_code not in (429, 503):
                    answer.raise_for_status()
                    return answer
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)

    async def _read(self, sent: Sent, *, pause: float, most: int | None) -> None:
        """Read its events, from where the last reader stopped; `most`: after so many this one vanishes."""
        last = sent.events[-1][0] if sent.events else 0
        headers = {"Last-Event-ID": str(last)} if last else {}
        number, kind = 0, ""
        async with self._client.stream("GET", f"/v1/stories/{sent.name}/events", headers=headers) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                key, _, value = line.partition(": ")
                if key == "id":
                    number = int(value)
                elif key == "event":
                    kind = value
                elif key == "data":
                    sent.events.append((number, kind, json.loads(value)))
                    sent.state = kind
                    if kind == "frame_finished" and sent.first is None:
                        sent.first = self.now
                    await asyncio.sleep(pause)
                    if most is not None and len(sent.events) >= most:
                        return

    async def _kill(self) -> None:
        """Kill at even shares of the stories' ends."""
        args = self.args
        kinds = ["server"] * args.kills + ["worker"] * args.worker_kills
        self.random.shuffle(kinds)
        for number, kind in enumerate(kinds, 1):
            while sum(sent.ended is not None for sent in self.sent) < args.stories * number / (len(kinds) + 2):
                self.memory[-1].append(self._server.memory())
                await asyncio.sleep(0.5)
            if kind == "server":
                self._server.kill()
                self.killed += 1
                self._server.start()
                await self.ready()
                self.memory.append([])
            elif workers := self._server.workers():
                os.kill(self.random.choice(workers).pid, SIGKILL)
                self.killed_workers += 1
        while True:
            self.memory[-1].append(self._server.memory())
            await asyncio.sleep(0.5)


def measure(args: argparse.Namespace) -> ServeReport:
    """See `bench serve`."""
    port = 18000 + os.getpid() % 1000
    words = ["--port", str(port), "--backend", args.backend, "--precision", args.precision]
    words += ["--limit-stories", str(args.stories), "--limit-queue", str(args.stories)]
    words += ["--engine-dir", str(args.engine_dir)] if args.engine_dir else []
    words += ["--workers", str(args.workers)] if args.workers else []
    with TemporaryDirectory() as folder:
        server = Server(words, Path(folder))
        server.start()
        try:
            found = asyncio.run(_measure(args, server, f"http://127.0.0.1:{port}"))
        finally:
            code = server.stop()
    if code:
        found.problems.append(f"the server ended with exit code {code} after SIGTERM")
    return found


async def _measure(args: argparse.Namespace, server: Server, address: str) -> ServeReport:
    limits = httpx.Limits(max_connections=2 * args.clients)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        load = Load(args, server, client)
        await load.ready()
        load.started = time.monotonic()
        seconds = await load.run()
        worst = await _compare(args, client, load.sent)
    outcomes = Counter(sent.state for sent in load.sent)
    told = [
        Counter((data["iteration"], data["frame"]) for _, kind, data in sent.events if kind == "frame_finished")
        for sent in load.sent
    ]
    redrawn = sum(count - 1 for frames in told for count in frames.values())
    done = [sent for sent in load.sent if sent.state == "completed"]
    problems = [f"{outcomes['failed']} stories failed"] if outcomes["failed"] else []
    problems += [f"only {len(load.sent)} of {args.stories} were accepted"] if len(load.sent) < args.stories else []
    for sent in load.sent:
        numbers = [number for number, _, _ in sent.events]
        if numbers != list(range(1, len(numbers) + 1)) or sum(kind in _ENDS for _, kind, _ in sent.events) != 1:
            problems.append(f"story {sent.name} has events {numbers}")
    for sent in done:
        frames = {
            (data["iteration"], data["frame"])
            for _, kind, data in sent.events
            if kind in ("frame_finished", "frame_found")
        }
        if len(frames) != len(sent.asked["prompts"]) * (args.iterations + 1):
            problems.append(f"story {sent.name} ended with {len(frames)} frames")
    half = args.precision not in ("auto", "fp32")
    for iteration, found in enumerate(worst):
        if found < (MIN_PSNR if half else _AT_LEAST[min(iteration, 1)]):
            problems.append(f"pictures of iteration {iteration} differ from those of run: {found:.1f} dB")
    if (growth := growth_of(load.memory[-1])) > _GROWTH:
        problems.append(f"the server's memory grew to {growth:.2f} times what it was")
    return ServeReport(
        environment=describe(torch.device("cpu"), args.commit),
        load={name: getattr(args, name) for name in ("stories", "clients", "rate", "frames", "iterations", "steps")}
        | {"workers": args.workers or 1, "backend": args.backend},
        seconds=seconds,
        outcomes=dict(outcomes),
        frames=sum(map(len, told)),
        redrawn=redrawn,
        latencies={
            "answer to a story": percentiles([sent.posted for sent in load.sent]),
            "until the first frame": percentiles([sent.first - sent.accepted for sent in done if sent.first]),
            "until the end": percentiles([sent.ended - sent.accepted for sent in done if sent.ended]),
        },
        memory=load.memory,
        kills=load.killed,
        worker_kills=load.killed_workers,
        worst_psnr=worst,
        problems=problems,
    )


async def _compare(args: argparse.Namespace, client: httpx.AsyncClient, stories: Sequence[Sent]) -> list[float]:
    """dB of the worst picture of each iteration of some stories to those that `run` draws."""
    checkpoint = Checkpoint.open(CheckpointPaths(MODEL, MODEL / "image_encoder", MODEL / "ip-adapter.safetensors"))
    pipeline = api.open_checkpoint(checkpoint, backend=args.backend, engine_dir=args.engine_dir)
    pixels, scales = checkpoint.geometry.default_pixels, constants.reference_scales(args.iterations)
    worst: dict[int, float] = {}
    for sent in [sent for sent in stories if sent.state == "completed"][:_COMPARED]:
        seed = sent.asked["settings"]["seed"]
        plan = RunPlan(height=pixels, width=pixels, steps=args.steps, seed=seed, scales=scales)
        for event in pipeline.run(Story(tuple(sent.asked["prompts"]), style="none"), plan):
            if isinstance(event, FrameFinished):
                place = f"iterations/{event.iteration}/frames/{event.frame}.png"
                answer = await client.get(f"/v1/stories/{sent.name}/{place}")
                served = Image.open(io.BytesIO(answer.raise_for_status().content)).convert("RGB")
                found = psnr(served, event.picture)
                worst[event.iteration] = min(found, worst.get(event.iteration, found))
    return [worst[iteration] for iteration in sorted(worst)]


def growth_of(memory: Sequence[int]) -> float:
    """The median of the last quarter over that of the second; 1 of too few samples."""
    quarter = len(memory) // 4
    if not quarter:
        return 1.0
    return statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter])


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """50, 90, 95 and 99 %."""
    if len(seconds) < 2:
        return {name: seconds[0] if seconds else 0.0 for name in ("p50", "p90", "p95", "p99")}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{percent}": cuts[percent - 1] for percent in (50, 90, 95, 99)}


def as_data(found: ServeReport) -> dict[str, Any]:
    """The report as JSON data."""
    return {"kind": KIND, "version": 2, "passed": not found.problems, **asdict(found)}


def markdown(found: ServeReport) -> str:
    """The page."""
    most = max(count for life in found.memory for count in life)
    facts = found.environment | {name: str(value) for name, value in found.load.items() if value is not None}
    facts |= {
        "duration": f"{found.seconds:.1f} s",
        "outcomes": ", ".join(f"{count} {state}" for state, count in sorted(found.outcomes.items())),
        "throughput": f"{60 * sum(found.outcomes.values()) / found.seconds:.1f} stories a minute, "
        f"{found.frames / found.seconds:.2f} frames a second",
        "SIGKILLs": f"{found.kills} of the server, {found.worker_kills} of workers",
        "frames that were drawn again": str(found.redrawn),
        "resident memory of the server": f"{most / 2**20:.0f} MiB at most; from the second quarter of its last life to "
        f"the last quarter {growth_of(found.memory[-1]):.3f} times",
        "worst picture to that of run, by iteration": ", ".join(f"{worst:.1f} dB" for worst in found.worst_psnr)
        or "none compared",
    }
    rows = [
        (name, *(f"{seconds[percent]:.3f}" for percent in ("p50", "p90", "p95", "p99")))
        for name, seconds in found.latencies.items()
    ]
    verdict = ["**Failed:**", *(f"- {problem}" for problem in found.problems)] if found.problems else ["Passed."]
    return "\n".join(
        [
            "# A server under load",
            "",
            *verdict,
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            *table(("seconds", "p50", "p90", "p95", "p99"), rows),
            "",
        ]
    )
