"""Releasing a version step by step: a policy, a sequential gate, a state machine. Pure: no clock, no storage, no Ray.

    rollout.toml -> policy.py                                  what the owner of a model wants
    replicas -> windows.py -> guards.py -> gate.py -> Verdict  what was measured, and what follows from it
                              comparison.py, evalues.py        the statistics
    (state, evidence, clock) -> machine.py -> (state, actions) what is to be written to the release log
    evidence.py                                                all of it on record; `triform rollout replay` recomputes it

Only numpy and msgspec are imported, so a Lambda function, too, may judge.
"""
