"""Replicas: how do several engine processes act as one engine?"""
