"""Where a study is kept: its folder, Optuna's journal or database, the records that are written there."""
