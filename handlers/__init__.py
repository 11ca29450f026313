"""The Lambda form: one file per function; what functions share is in the files that begin with an underscore (docs/lambda.md)."""
