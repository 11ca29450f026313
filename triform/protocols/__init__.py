"""The protocols of the online forms, once for all hosts: what a request says, as arrays, and what an answer says of them.

    body -> oip.py | tfs.py | invocations.py -> Call(inputs, say) -> Exchange.infer -> say(outputs) -> body

No protocol knows of HTTP routes, hosts or models' files: `http.py` chooses the model and the protocol.
"""
