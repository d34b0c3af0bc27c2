"""Scores of answers from tables and forms: WTQ, TabFact, TableVQABench, DeepForm and Kleister Charity."""
