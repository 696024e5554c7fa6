"""The stages: prepare, fit, rollout, train and evaluate, one verb each."""
