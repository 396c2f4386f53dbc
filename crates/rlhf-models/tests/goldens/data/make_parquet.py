"""Writes the Parquet files of this folder. pip install pyarrow==26.0.1 && python make_parquet.py"""
import json
import pyarrow as pa
import pyarrow.parquet as pq

rows = [json.loads(line) for line in open("preference.jsonl")]
for i, row in enumerate(rows):
    row["margin"] = None if i == 1 else i / 2
pq.write_table(pa.Table.from_pylist(rows), "preference.parquet", compression="snappy", row_group_size=3)

turn = lambda role, content: {"role": role, "content": content}
chats = [{"prompt": [turn("system", "Be brief."), turn("user", f"Hi {i}!")], "completion": [turn("assistant", "Yes, of course.")],
          "tools": json.dumps([{"name": "f"}]) if i else None, "id": i} for i in range(3)]
pq.write_table(pa.Table.from_pylist(chats), "conversations.parquet", compression="zstd")
