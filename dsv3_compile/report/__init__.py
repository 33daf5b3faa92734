"""What a compile did, for people: the page, the terminal, dumps. The document itself is `dsv3_compile.inspection`."""
