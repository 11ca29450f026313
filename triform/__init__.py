"""Triform: one ONNX predictor core that runs as AWS Lambda handlers, Ray Serve deployments and Ray Data batch jobs.

Importing this package costs nothing: take what you need from its modules, one noun a file.

    from triform.repository import open_repository, resolve
    from triform.predictor import Predictor

    repository = open_repository("models")
    predictor = Predictor.load(repository.package(*resolve(repository, "flight-delay@stable")))
    outputs = predictor.predict({"x": array})
"""

__version__ = "0.1.0"
