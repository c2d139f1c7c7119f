#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""qmp.py SOCKET COMMAND [JSON arguments]: one QMP command; prints what it returns."""
import json
import socket
import sys

s = socket.socket(socket.AF_UNIX)
s.settimeout(30)
s.connect(sys.argv[1])
lines = s.makefile("rw")
json.loads(lines.readline())
for command, arguments in ("qmp_capabilities", {}), (sys.argv[2], json.loads((sys.argv[3:] or ["{}"])[0])):
    lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    lines.flush()
    while True:
        answer = json.loads(lines.readline())
        if "error" in answer:
            sys.exit(answer["error"]["desc"])
        if "return" in answer:
            break
print(json.dumps(answer["return"]))
