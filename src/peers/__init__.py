"""Other libraries, run in environments of their own and measured beside this one."""
