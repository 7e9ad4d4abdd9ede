"""Predict, correct, accept, retrain: labels that grow in cycles, with nothing lost (MRSegmentator's loop)."""
