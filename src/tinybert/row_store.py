"""Rows in the `datasets` cache, under a name made of their content.

So a changed file is never mistaken for the one before, and what is computed from the rows is cached too.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa

from tinybert.errors import InputError, one_line


def store_rows(table: pa.Table) -> tuple[datasets.Dataset, str]:
    """Return rows in the `datasets` cache, mapped into memory, and their fingerprint.

    Raises:
        InputError: The cache cannot be written.
    """
    fingerprint = row_fingerprint(datasets.Dataset(table))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tinybert" / fingerprint
    final = folder / "rows.arrow"
    if not final.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                part = Path(scratch) / "rows.arrow"
                with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=1000)
                part.replace(final)
        except OSError as error:
            raise InputError(f"cannot write {folder} ({one_line(error)}): set HF_DATASETS_CACHE") from error
    return datasets.Dataset.from_file(str(final)), fingerprint


def row_fingerprint(rows: datasets.Dataset) -> str:
    """Return the SHA-256 of the values of rows: the same on every machine, other if a row differs."""
    digest = hashlib.sha256()
    for batch in rows.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()
