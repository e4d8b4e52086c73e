"""The ledger's database: SQLite with durable transactions, checked whole before it is used."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common.errors import OperatorError
from learner.ledger.bodies import Bodies
from learner.ledger.mark import Mark
from learner.ledger.schema import ADDED, DIGESTED, SCHEMA_VERSION, TABLES, row_digest

DISK_ERRORS = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_BUSY")


LOG_PAGES = 4096
"""The log is taken into the file when it is this long: 16 MiB, so that the sync which that takes is rare."""


class Database:
    """One connection, safe to share between threads. What a transaction changed is on disk when it ends."""

    def __init__(self, path: Path, *, is_read_only: bool = False) -> None:
        """Open or create. Raises OperatorError where the file is no ledger of this version, or damaged.

        Then all its files are as they were found.
        """
        if not is_read_only and path.exists():
            # Closed by its last writer, a database takes in its log: one that is refused must keep it.
            Database(path, is_read_only=True).close()
        self.path = path
        self.bodies = Bodies(path.with_suffix(".bodies"))
        self.lock = threading.RLock()
        self._mark: Mark | None = None
        self._committer: ThreadPoolExecutor | None = None
        try:
            mode = "ro" if is_read_only else "rwc"
            self._db = sqlite3.connect(
                f"file:{_quoted(path)}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=10
            )
            self._db.create_function("row_digest", -1, row_digest, deterministic=True)
            self._check_pages()
            if not is_read_only:
                self._db.executescript(
                    f"PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint={LOG_PAGES};" + TABLES
                )
            if self._has_tables():
                self._check_rows()
        except sqlite3.Error as error:
            raise OperatorError(
                f"{path}: {error}, expected a ledger of an earlier start or a folder to create one in"
            ) from error
        if self._has_tables():
            self._open_mark(is_read_only=is_read_only)

    def _has_tables(self) -> bool:
        """False where a crash came before the first transaction."""
        return self.count("SELECT count(*) FROM sqlite_schema") > 0

    def has_table(self, name: str) -> bool:
        return self.count("SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = ?", (name,)) == 1

    def _check_pages(self) -> None:
        faults = [fault for (fault,) in self._db.execute("PRAGMA integrity_check(1)")]
        if faults != ["ok"]:
            fault = faults[0].splitlines()[-1]
            raise OperatorError(f"{self.path}: is damaged ({fault}), expected a whole ledger: restore run.dir")

    def _check_rows(self) -> None:
        """All of them; the files of bodies are checked when they are read."""
        found = dict(self._db.execute("SELECT name, value FROM facts"))
        if (schema := found.get("schema", SCHEMA_VERSION)) != SCHEMA_VERSION:
            raise OperatorError(f"{self.path}: got ledger schema {schema}, expected {SCHEMA_VERSION}")
        for table in DIGESTED:
            if table in ADDED and not self.has_table(table):
                continue
            if num_bad := self.num_damaged(table):
                raise OperatorError(
                    f"{self.path}: is damaged ({num_bad} rows of {table} are not those that were written), expected a "
                    "whole ledger: restore run.dir"
                )

    def num_damaged(self, table: str) -> int:
        """Rows of `table` whose digest is not that of their content."""
        return self.count(f"SELECT count(*) FROM {table} WHERE digest IS NOT row_digest({DIGESTED[table]})")

    def _open_mark(self, *, is_read_only: bool) -> None:
        path = self.path.with_suffix(".mark")
        if is_read_only and not path.exists():
            return
        mark = Mark(path, is_read_only=is_read_only)
        acknowledged, held = mark.read(), self._num_transactions()
        if acknowledged > held:
            raise OperatorError(
                f"{self.path}: holds {held} transactions, expected the {acknowledged} that {path.name} counts: the "
                "ledger or its log was cut, or is an older copy; restore run.dir, or delete that file to go on without"
            )
        if is_read_only:
            mark.close()
        else:
            self._mark = mark

    def _num_transactions(self) -> int:
        return int(self.fact("transactions") or 0)

    def add_temporary(self, script: str) -> None:
        """Create what is of this connection only; outside of any transaction."""
        with self.lock:
            self._db.executescript(script)

    def execute(self, query: str, parameters: tuple[object, ...] = ()) -> sqlite3.Cursor:
        return self._db.execute(query, parameters)

    def executemany(self, query: str, rows: "list[tuple[object, ...]]") -> sqlite3.Cursor:
        return self._db.executemany(query, rows)

    def count(self, query: str, parameters: tuple[object, ...] = ()) -> int:
        """The one number that `query` gives."""
        with self.lock:
            return int(self._db.execute(query, parameters).fetchone()[0])

    def fact(self, name: str) -> str | None:
        with self.lock:
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def set_fact(self, name: str, value: str) -> None:
        with self.transaction():
            self._db.execute("REPLACE INTO facts VALUES (?, ?)", (name, value))

    def increase(self, name: str, by: int = 1) -> int:
        """Add to a fact that counts from 0; returns it as it was before."""
        with self.transaction():
            before = int(self.fact(name) or 0)
            self.set_fact(name, str(before + by))
            return before

    @contextmanager
    def transaction(self, *, while_committing: Callable[[Callable[[], bool]], None] | None = None) -> Iterator[None]:
        """All of it on disk at its end, or nothing; one inside another is part of that. Raises OperatorError where the
        disk refuses.

        `while_committing` runs while the disk is busy; it must not ask the database, and is given a function that tells
        whether the commit has ended.
        """
        with self.lock:
            if self._db.in_transaction:
                yield
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                num_changes = self._db.total_changes
                yield
                number = self.increase("transactions") + 1 if self._db.total_changes > num_changes else 0
                self._commit(while_committing if number else None)
                if number and self._mark:
                    self._mark.write(number)
            except BaseException as error:
                self.bodies.forget()
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                is_disk = isinstance(error, sqlite3.OperationalError) and error.sqlite_errorname.startswith(DISK_ERRORS)
                if is_disk:
                    raise OperatorError(
                        f"{self.path}: {error}, expected free disk space and a writable file"
                    ) from error
                raise

    def _commit(self, meanwhile: Callable[[Callable[[], bool]], None] | None) -> None:
        if meanwhile is None:
            self._write()
            return
        self._committer = self._committer or ThreadPoolExecutor(1, thread_name_prefix="commit")
        committed = self._committer.submit(self._write)
        try:
            meanwhile(committed.done)
        finally:
            committed.result()

    def _write(self) -> None:
        """Bodies first: what the ledger names is there."""
        self.bodies.sync()
        self._db.execute("COMMIT")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read inside is of one moment, whoever writes meanwhile."""
        with self.lock:
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")

    def close(self) -> None:
        with self.lock:
            self._db.close()
            if self._committer:
                self._committer.shutdown()
            self.bodies.close()
            if self._mark:
                self._mark.close()
                self._mark = None


def _quoted(path: Path) -> str:
    """A path as part of a URI."""
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
