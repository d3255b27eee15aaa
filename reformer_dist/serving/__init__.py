"""`reformer-serve`: a trained model behind the completions and chat protocol of OpenAI.

`protocol` turns the body of a request into what `inference.continuation` takes, and texts into bodies. `engine` is
the thread that owns the model. `app` has the routes, `connection` the timeouts of slow clients, `metrics` the
counters.
"""
