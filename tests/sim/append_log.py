"""Work on one file to which everybody appends: offsets and the length are linearizable."""

from __future__ import annotations

import os
from typing import Final

from tests.histories.history import fill
from tests.sim.work import Work, outcome

from kvfs.common.errors import KvfsError

LOG: Final = "/log"


class Log(Work):
    """Appends of one size, and questions for the length."""

    BYTES = 100

    async def operate(self) -> None:
        if self.random.randrange(3):
            await self.append()
        else:
            await self.length()

    async def append(self) -> None:
        value = self.value()
        call = self.record.history.call(self.name, "length of log", "append", self.BYTES)
        try:
            file = await self.client.open_path(LOG, os.O_WRONLY | os.O_APPEND)
            try:
                offset = await file.append([fill(value, self.BYTES)])
            finally:
                await file.close()
        except KvfsError as error:
            self.say(f"append {value}: {outcome(error)}")
            self.record.unknown += 1
            call.unknown(type(error).__name__)
            return
        self.say(f"append {value}: at {offset}")
        self.record.done["append"] += 1
        call.done(offset)
        self.record.files.setdefault(f"{LOG}@{offset}", set()).add(fill(value, self.BYTES))

    async def length(self) -> None:
        call = self.record.history.call(self.name, "length of log", "length")
        try:
            file = await self.client.open_path(LOG, os.O_RDONLY)
            try:
                length = await file.current_length()
            finally:
                await file.close()
        except KvfsError as error:
            self.say(f"length? {outcome(error)}")
            call.never()
            return
        self.say(f"length? {length}")
        self.record.done["length of a file"] += 1
        call.done(length)
