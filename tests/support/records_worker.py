"""Run by test_records.py in its own process, and killed there: writes 40 made-up samples into a folder."""

import sys
import time

import numpy as np

from src.records.folder import RunFolder
from src.records.record import Record
from src.retention.store import Kept

with RunFolder(sys.argv[1], {"seed": 0}, "seed: 0\n") as run:
    for i in range(40):
        key = ("qa" if i % 2 else "code", str(i), f"{i:016x}")
        if run.done(key):
            continue
        random = np.random.default_rng(i)
        positions = [np.stack([np.sort(random.permutation(100)[:20]) for _ in range(2)]) for _ in range(3)]
        task, id_, digest = key
        time.sleep(0.003)
        score = float(random.random())
        record = Record(task=task, id=id_, prompt_hash=digest, prompt_tokens=100, new_tokens=4, score=score)
        run.append(record, Kept(positions, positions))
    run.finish(policy="p", model="m", budget=20, plot=False)
