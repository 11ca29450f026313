"""The Lambda form: one file per function; `_boot.py` puts together what they stand on.

predict.py    HTTP requests and direct invocations        sqs.py          messages of queues
s3.py         objects that arrive on S3                   nightly.py      starts the batch run of the night
pre_traffic.py  tries a new version before it gets traffic
"""
