"""Ray: the cluster that a study's trials run on. Nothing outside this folder, `preflight/` and `jobs/` imports it.

`connection.py` joins or starts a cluster. `nodes.py`, `packing.py`, `probe.py`, `pace.py` and `room.py` say how many trials it holds at a
moment; `sharing.py` lets the trials on one GPU run side by side (`mps.py` on every node).
`shared.py` and `pack.py` bring the task to its workers; `tune.py` runs the trials, on one worker (`worker.py`) or on several (`group.py`);
`ask_tell.py` is the study as Tune sees it.
`losses.py` says why a trial was lost, `head.py` notices that the cluster is. Whether a cluster is ready is checked in `preflight/`; a study
as a job of one is in `jobs/`. Both import from here, so that Ray is told first what stands below.
"""

import os

# Usage statistics, log files per trial and Tune's own tables stay off; an explicit setting of the user wins. Ray reads these at import.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial without a GPU share sees none
    "TUNE_MAX_PENDING_TRIALS_PG": "1024",  # the study's own searcher decides how many wait, by what the cluster holds at that moment
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a lost trial is reported in a sentence
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # its snapshot holds every trial, stops all workers while it is written, and is never read
}.items():
    os.environ.setdefault(_name, _value)
