"""Load tests: real flights against any online form, each answer held against what the batch job scored.

    __main__.py   the command: what is asked for, refused where it cannot be meant
    flights.py    example built, scored -> payloads.py: requests in each protocol, with the answers that are right
    targets.py    Ray Serve or the local Lambda on loopback, or a deployment, looked at meanwhile (watching.py, metrics.py)
    generator.py  Locust, in processes of its own -> users.py: arrivals or callers -> clients.py -> answers.py -> records.py
    results.py    records + what was watched -> Result -> thresholds.py: verdict -> report.py, plots.py, junit.py

The process that starts targets and writes reports never imports Locust, which patches whatever imports it; the processes that ask
import neither Ray nor pyarrow.
"""
