"""PeerProcess: this process's end of the other one in peer.py."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

from tiercache import errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

START_S = 30.0
_LINE_BYTES_MAX = 1 << 24


class PeerProcess:
    """A process that has a transport; `call` has it do what `peer.Told` can."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Of a process that was just started; see `start`."""
        self.process = process
        self.address = b""
        self.why_usable = ""
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0
        self._hearing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, name: str, host: str, *, before: Sequence[str] = (),
                    env: Mapping[str, str] | None = None) -> PeerProcess:  # fmt: skip
        """Starts one with a transport of this name. `before`: what the command line begins with ("ip", "netns", "exec",
        ...). The caller closes or kills it."""
        process = await asyncio.create_subprocess_exec(
            *before, sys.executable, "-m", "tiercache.testing.transports.peer", name, host,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LINE_BYTES_MAX, env=env,
        )  # fmt: skip
        peer = cls(process)
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        if not line:
            await peer.kill()
            raise errors.UnavailableError("the other process did not start; its standard error says why")
        said = json.loads(line)
        peer.address, peer.why_usable = bytes.fromhex(said["address"]), said["usable"]
        peer._hearing = asyncio.create_task(peer._hear())
        return peer

    async def call(self, method: str, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """Has it do something, and answers what came of it; raises its fault here."""
        assert self.process.stdin is not None
        self._asked += 1
        answer = self._answers[self._asked] = asyncio.get_running_loop().create_future()
        question = {"id": self._asked, "call": method, **arguments}
        try:
            async with asyncio.timeout(timeout_s):
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
                await self.process.stdin.drain()
                return await answer
        finally:
            self._answers.pop(question["id"], None)

    async def _hear(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            said = json.loads(line)
            answer = self._answers.get(said["id"])
            if answer is None or answer.done():
                continue
            if "fault" in said:
                fault = getattr(errors, said["fault"], RuntimeError)
                answer.set_exception(fault(f"{said['fault']}: {said['message']}"))
            else:
                answer.set_result(said["answer"])
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(errors.UnavailableError("the other process is gone"))

    def stop(self) -> None:
        """Has it stand still."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Has it go on."""
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """Kills it, and waits for that."""
        if self.process.returncode is None:
            self.process.kill()
        await self._over()

    async def close(self) -> int:
        """Has it end by itself, and answers its exit status; kills it where that takes long."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
        return await self._over()

    async def _over(self) -> int:
        status = await self.process.wait()
        if self._hearing is not None:
            await self._hearing
        if self.process.stdin is not None:
            self.process.stdin.close()
        return status
