"""Sampling: which logit updates and seeds does a request bring, and how does beam search use single steps?"""
