"""The vocabulary that policies and engine share: prompt, step, state, cache. It knows no policy and no model."""
