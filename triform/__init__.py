"""Triform: one ONNX predictor core that runs as AWS Lambda handlers, Ray Serve deployments and Ray Data batch jobs.

Importing this package costs nothing: take what you need from its modules, one noun a file.

    from triform.repository import open_repository
    from triform.predictor import Predictor

    predictor = Predictor.load(open_repository("models"), "flight-delay@stable")
    outputs = predictor.predict({"x": array})
"""

__version__ = "0.1.0"
