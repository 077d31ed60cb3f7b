//! Sans-IO, deterministic: sequences, block pool, prefix index, scheduler, lowering, runner.
