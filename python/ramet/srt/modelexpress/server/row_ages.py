"""Owns how old a row of the server's store is, and forgets what is in the store no more."""

from collections.abc import Iterable

from ramet.srt.modelexpress.ages import AgeTracker
from ramet.srt.modelexpress.server.store import Row


class RowAges(AgeTracker):
    """The ages of the rows of a store."""

    def row_age_s(self, row: Row) -> float:
        """Seconds since the record behind the row was written."""
        return self.age_s(row.source_id, row.worker_id, row.worker_rank, row.updated_at)

    def keep_only(self, rows: Iterable[Row]) -> None:
        """Forget what is in none of `rows`: all rows that there are."""
        keys = {(row.source_id, row.worker_id, row.worker_rank) for row in rows}
        self._seen = {key: seen for key, seen in self._seen.items() if key in keys}
