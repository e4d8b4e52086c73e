"""The expert store: demonstrations without duplicates, and which step of which run used them, in one SQLite file."""

import hashlib
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.chat import ChatMessage
from common.config.schema import Config
from common.errors import OperatorError

BUSY_TIMEOUT_S = 30.0
"""Longest wait for another process that writes to the same store."""
APPLICATION_ID = 0x43485244
"""SQLite's mark of what a file is, "CHRD", so that no other database is taken for a store."""
SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS rows (row_id INTEGER PRIMARY KEY, digest TEXT UNIQUE NOT NULL,"
    " messages TEXT NOT NULL, source TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS uses (run_id TEXT NOT NULL, step INTEGER NOT NULL,"
    " row_id INTEGER NOT NULL REFERENCES rows, num_uses INTEGER NOT NULL,"
    " PRIMARY KEY (run_id, step, row_id)) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_ROWS = "SELECT row_id, digest, CAST(messages AS BLOB), source FROM rows"
_EXPECTED = {
    sqlite3.SQLITE_NOTADB: "an expert store (chord-expert import makes one)",
    sqlite3.SQLITE_CORRUPT: "an undamaged store (restore it, or import its rows again)",
    sqlite3.SQLITE_FULL: "free space there and in the temporary directory; nothing was written",
    sqlite3.SQLITE_BUSY: f"no other process to write to it for longer than {BUSY_TIMEOUT_S:g} s",
}


@dataclass(frozen=True)
class NewRow:
    """A demonstration that the store has not numbered yet."""

    messages: tuple[ChatMessage, ...]
    source: str
    """Where it came from: a file, or a family of problems."""


@dataclass(frozen=True)
class ExpertRow:
    """One demonstration of the store."""

    row_id: int
    """Counts from 1 in the order of import; never reused."""
    messages: tuple[ChatMessage, ...]
    """A conversation that ends with the assistant."""
    source: str


@dataclass(frozen=True)
class AddCounts:
    """What became of the rows of one import."""

    num_added: int
    num_duplicates: int
    """Rows whose messages the store, or an earlier row of the same import, held already."""


@dataclass(frozen=True)
class StoreStats:
    """The store in numbers; means are 0 where it is empty."""

    num_rows: int
    rows_per_source: dict[str, int]
    total_chars: int
    """Characters of all messages' contents."""
    mean_chars: float
    """Characters per row."""
    min_uses: int
    mean_uses: float
    max_uses: int
    num_never_used: int


def store_path(config: Config) -> Path:
    """Where the run's expert store lies: `expert.path`, or RUN_DIR/expert.sqlite where that is empty."""
    return Path(config.expert.path) if config.expert.path else Path(config.run.dir) / "expert.sqlite"


def canonical_json(messages: Sequence[ChatMessage]) -> str:
    """The one spelling of a conversation, which is stored and hashed."""
    return json.dumps([message.model_dump() for message in messages], ensure_ascii=False, separators=(",", ":"))


def content_digest(text: bytes) -> str:
    """SHA-256 of a conversation's canonical JSON: rows with the same messages have the same one."""
    return hashlib.sha256(text).hexdigest()


class ExpertStore:
    """An expert store, used by the thread that opened it; `read` and `record_uses` by any.

    Every method raises OperatorError, naming the file, where SQLite cannot read or write it.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open the store at `path`; where there is none, make it if `create`, else raise OperatorError."""
        self.path = path
        self._lock = threading.RLock()
        if create:
            _make_folder(path)
        elif not path.is_file():
            raise OperatorError(f"{path}: got no such file, expected an expert store (chord-expert import makes one)")
        with self._reporting():
            uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
            self._db = sqlite3.connect(
                uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(create=create)
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        self._db.close()

    def add(self, rows: Iterable[NewRow]) -> AddCounts:
        """Add those rows whose messages are new, all in one transaction: an error in `rows` adds nothing.

        Rows wait in a temporary table, so that a long import holds up nobody else who writes.
        """
        with self._transaction():
            self._db.execute("CREATE TEMP TABLE incoming (digest TEXT, messages TEXT, source TEXT)")
            num_rows = self._db.executemany("INSERT INTO incoming VALUES (?, ?, ?)", map(_columns, rows)).rowcount
            added = self._db.execute(
                "INSERT OR IGNORE INTO rows (digest, messages, source)"
                " SELECT digest, messages, source FROM incoming ORDER BY rowid"
            ).rowcount
            self._db.execute("DROP TABLE incoming")
        return AddCounts(added, max(num_rows, 0) - added)

    def read(self, row_ids: Iterable[int]) -> list[ExpertRow]:
        """The rows in the order asked for. Raises OperatorError where one is missing or does not match its digest."""
        with self._lock:
            return [self._read_one(row_id) for row_id in row_ids]

    def rows(self, *, limit: int = -1) -> Iterator[ExpertRow]:
        """The rows in the order of their ids, at most `limit` unless it is negative; errors as for `read`."""
        with self._reporting():
            for columns in self._db.execute(f"{_ROWS} ORDER BY row_id LIMIT ?", (limit,)):
                yield self._to_row(*columns)

    def row_ids(self) -> list[int]:
        """Ids of all rows, ascending."""
        with self._reporting():
            return [row_id for (row_id,) in self._db.execute("SELECT row_id FROM rows ORDER BY row_id")]

    def record_uses(self, run_id: str, step: int, row_ids: Iterable[int]) -> None:
        """Record the rows that a step used, as often as they are listed, in place of what was recorded for that step.

        A replayed step so counts once, and one taken again after a rewind counts as it was taken last.
        """
        uses = [(run_id, step, row_id, num_uses) for row_id, num_uses in Counter(row_ids).items()]
        with self._transaction():
            self._db.execute("DELETE FROM uses WHERE run_id = ? AND step = ?", (run_id, step))
            self._db.executemany("INSERT INTO uses VALUES (?, ?, ?, ?)", uses)

    def use_counts(self) -> dict[int, int]:
        """How often each row was used, by all runs together; rows never used are in it."""
        query = "SELECT row_id, coalesce(sum(num_uses), 0) FROM rows LEFT JOIN uses USING (row_id) GROUP BY row_id"
        with self._reporting():
            return dict(self._db.execute(query))

    def stats(self) -> StoreStats:
        """Reads every row once."""
        sources, total_chars = Counter[str](), 0
        for row in self.rows():
            sources[row.source] += 1
            total_chars += sum(len(message.content) for message in row.messages)
        uses = list(self.use_counts().values())
        return StoreStats(
            num_rows=len(uses),
            rows_per_source=dict(sources.most_common()),
            total_chars=total_chars,
            mean_chars=total_chars / max(len(uses), 1),
            min_uses=min(uses, default=0),
            mean_uses=sum(uses) / max(len(uses), 1),
            max_uses=max(uses, default=0),
            num_never_used=uses.count(0),
        )

    def verify(self) -> Iterator[str]:
        """One line per problem: SQLite's own findings, messages that differ from their digest, uses of missing rows."""
        try:
            for (finding,) in self._db.execute("PRAGMA integrity_check"):
                if finding != "ok":
                    yield f"{self.path}: {finding}"
            for row_id, digest, text, _ in self._db.execute(f"{_ROWS} ORDER BY row_id"):
                if content_digest(text) != digest:
                    yield self._mismatch(row_id)
            for (row_id,) in self._db.execute("SELECT DISTINCT row_id FROM uses EXCEPT SELECT row_id FROM rows"):
                yield f"{self.path}: row {row_id}: got uses of a row that is not there, expected the row"
        except sqlite3.DatabaseError as error:
            yield f"{self.path}: cannot be read further ({error})"

    def check(self) -> None:
        """Raises OperatorError with the first problem that `verify` finds."""
        for problem in self.verify():
            raise OperatorError(f"{problem.splitlines()[-1]} (expected a whole expert store: {self.path})")

    def fingerprint(self) -> str:
        """A hash over all messages in the order of their rows: equal for stores that a run cannot tell apart."""
        with self._reporting():
            digests = [digest for (digest,) in self._db.execute("SELECT digest FROM rows ORDER BY row_id")]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def _prepare(self, *, create: bool) -> None:
        """Make sure that the file is a store before anything is written to it."""
        mark, version, num_tables = self._identity()
        if create and (mark, num_tables) == (0, 0):
            self._create_schema()
        elif mark != APPLICATION_ID:
            raise OperatorError(f"{self.path}: got another kind of SQLite database, expected an expert store")
        elif version != SCHEMA_VERSION:
            raise OperatorError(f"{self.path}: got a store of schema {version}, expected schema {SCHEMA_VERSION}")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")

    def _identity(self) -> tuple[int, int, int]:
        queries = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        mark, version, num_tables = (self._db.execute(query).fetchone()[0] for query in queries)
        return mark, version, num_tables

    def _create_schema(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        with self._transaction("IMMEDIATE"):
            for statement in _SCHEMA:
                self._db.execute(statement)

    def _read_one(self, row_id: int) -> ExpertRow:
        with self._reporting():
            columns = self._db.execute(f"{_ROWS} WHERE row_id = ?", (row_id,)).fetchone()
        if columns is None:
            raise OperatorError(f"{self.path}: row {row_id}: got none, expected the store that the run began with")
        return self._to_row(*columns)

    def _to_row(self, row_id: int, digest: str, text: bytes, source: str) -> ExpertRow:
        if content_digest(text) != digest:
            raise OperatorError(self._mismatch(row_id))
        return ExpertRow(row_id, tuple(ChatMessage(**message) for message in json.loads(text)), source)

    def _mismatch(self, row_id: int) -> str:
        return f"{self.path}: row {row_id}: got messages that do not match their digest, expected them as imported"

    @contextmanager
    def _transaction(self, kind: str = "DEFERRED") -> Iterator[None]:
        """All or nothing."""
        with self._lock, self._reporting():
            self._db.execute(f"BEGIN {kind}")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite has rolled back by itself after some errors
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """SQLite's errors as OperatorError; wrong use of its interface stays what it is."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without its extended part
            expected = _EXPECTED.get(code, "an expert store that can be read and written")
            raise OperatorError(f"{self.path}: got {error}, expected {expected}") from error


def _columns(row: NewRow) -> tuple[str, str, str]:
    text = canonical_json(row.messages)
    return content_digest(text.encode()), text, row.source


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"{path}: cannot be made ({error.strerror}), expected a folder to write to") from error
