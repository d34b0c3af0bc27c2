"""From the plan to micro-batches: loader processes, collation, the quarantine ledger."""
