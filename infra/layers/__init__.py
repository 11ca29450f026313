"""Builds what the Lambda form is deployed with: `python -m infra.layers build`.

    requirements/lambda.txt -> wheels of the target -> trimmed -> runtime, powertools
    the checkout -> what an online request needs    -> core
    a model repository -> refs resolved, verified   -> models
    each folder -> bytecode of the target's Python -> a zip that is the same twice

A layer's folder is what Lambda unpacks into /opt.
"""
