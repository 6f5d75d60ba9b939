"""Rows of many small files in one table, sorted; where they are many, a folder of tables, a part at a time."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sanity.records import atomically, schema

LARGE = 5_000_000
"""Rows from which a table is a folder of parts: what a laptop still holds in memory with ease."""
AT_ONCE = 2_000_000
"""Rows held in memory while parts are filled."""
SORT = ("seed", "order", "stage_index", "method", "similarity", "image")

Rank = Mapping[str, Sequence[object]]


def join(files: Sequence[Path], row: type[NamedTuple], rank: Rank, target: Path) -> dict[str, int]:
    """Write the rows of all files, sorted, to `target`; returns the number of rows by status, if they have one.

    rank: column -> its values in order; other columns sort by themselves. From LARGE rows on the target is a
    folder, a file for each seed, order and stage, named so that the files' order is the rows' own; readers of
    Parquet take it as one data set. Sorting is stable. Memory: LARGE rows or those of a part.
    """
    rows = sum(pq.read_metadata(path).num_rows for path in files)
    if rows < LARGE:
        table = arranged([pq.read_table(path) for path in files], row, rank)
        _remove(target)
        atomically(target, lambda path: pq.write_table(table, path))
        return statuses(table)
    return _partitioned(files, row, rank, target)


def arranged(tables: Sequence[pa.Table], row: type[NamedTuple], rank: Rank) -> pa.Table:
    """Concatenate and sort."""
    plain = schema(row)
    empty = plain.empty_table()
    table = pa.concat_tables([empty, *(t.replace_schema_metadata(plain.metadata) for t in tables)]).combine_chunks()
    columns = {name: table[name] for name in SORT if name in table.column_names}
    for name, values in rank.items():
        if name in columns:
            columns[name] = pc.index_in(columns[name], pa.array(values, table.schema.field(name).type))
    order = pc.sort_indices(pa.table(columns), [(name, "ascending") for name in columns])
    return table.take(order)


def statuses(table: pa.Table) -> dict[str, int]:
    """Rows by status, most frequent first, so that what could not be scored is in plain sight."""
    if "status" not in table.column_names:
        return {}
    return dict(Counter({e["values"]: e["counts"] for e in pc.value_counts(table["status"]).to_pylist()}).most_common())


def _partitioned(files: Sequence[Path], row: type[NamedTuple], rank: Rank, target: Path) -> dict[str, int]:
    """Deal the rows out to unsorted parts, then sort each part by itself."""
    loose, whole = (target.with_name(f".{target.name}.{word}") for word in ("loose", "part"))
    for folder in (loose, whole):
        _remove(folder)
        folder.mkdir()
    total: Counter[str] = Counter()
    try:
        _deal(files, row, rank, loose)
        for path in sorted(loose.iterdir()):
            table = arranged([pq.read_table(path)], row, rank)
            total += Counter(statuses(table))
            pq.write_table(table, whole / path.name)
            path.unlink()
        _remove(target)
        whole.replace(target)
    finally:
        _remove(loose)
        _remove(whole)
    return dict(total.most_common())


def _deal(files: Sequence[Path], row: type[NamedTuple], rank: Rank, loose: Path) -> None:
    writers: dict[str, pq.ParquetWriter] = {}
    try:
        for table in _batches(files, row):
            for name, part in _parts(table, rank):
                if name not in writers:
                    writers[name] = pq.ParquetWriter(loose / name, schema(row))
                writers[name].write_table(part)
    finally:
        for writer in writers.values():
            writer.close()


def _batches(files: Sequence[Path], row: type[NamedTuple]) -> Iterator[pa.Table]:
    plain, held, rows = schema(row), [], 0
    for path in files:
        held.append(pq.read_table(path).replace_schema_metadata(plain.metadata))
        rows += held[-1].num_rows
        if rows >= AT_ONCE:
            yield pa.concat_tables(held)
            held, rows = [], 0
    if held:
        yield pa.concat_tables(held)


def _parts(table: pa.Table, rank: Rank) -> Iterator[tuple[str, pa.Table]]:
    """Rows of each seed, order and stage, under the name of its file."""
    columns = [name for name in ("seed", "order", "stage_index") if name in table.column_names]
    for one in table.select(columns).group_by(columns).aggregate([]).to_pylist():
        places = [_place(name, one[name], rank) for name in columns]
        kept = pa.scalar(True)
        for name in columns:
            kept = pc.and_(kept, pc.equal(table[name], pa.scalar(one[name])))
        yield "-".join(f"{place:04d}" for place in places) + ".parquet", table.filter(kept)


def _place(column: str, value: Any, rank: Rank) -> int:
    return list(rank[column]).index(value) if column in rank else int(value)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
