"""How are numbers, names and progress shown in a terminal, a table or a page?"""
