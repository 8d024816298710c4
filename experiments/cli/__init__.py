"""How does a command read its arguments, report an error and choose its exit code?"""
