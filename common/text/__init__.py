"""Text: how does text become tokens, and how do tokens become text?"""
