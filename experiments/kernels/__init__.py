"""How fast is each native kernel, beside its limit and the framework's operators?"""
