"""How does a command read its arguments, show progress, report an error and choose its exit code?"""
