"""How vectors are made, fast: bundles, loaded models, batching and the backends. Knows neither HTTP
nor text.
"""
