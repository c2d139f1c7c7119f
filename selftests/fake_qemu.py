#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""fake_qemu.py refuse|die ...: a QEMU that loads any device state, and then will not run.

It knows as much of QMP as kmig says to a destination. To 'cont' it answers with an error,
or ends at once.
"""
import array
import json
import os
import re
import socket
import sys
import threading

manner = sys.argv[1]
path = re.search(r"unix:([^,]*),", sys.argv[sys.argv.index("-qmp") + 1]).group(1)
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
client, _ = server.accept()
descriptors = []


def send(message):
    client.sendall(json.dumps(message).encode() + b"\r\n")


def load(descriptor):
    """The stream has no end that shows from outside: a pause after something has come."""
    stream = socket.socket(fileno=descriptor)
    while stream.recv(1 << 20):
        stream.settimeout(1)
        try:
            while stream.recv(1 << 20):
                pass
        except TimeoutError:
            send({"event": "MIGRATION", "data": {"status": "completed"}})
            stream.settimeout(None)


def execute(command):
    if command == "query-status":
        return {"status": "inmigrate", "running": False}
    if command == "query-migrate-capabilities":
        return [{"capability": c, "state": False} for c in ("events", "x-ignore-shared")]
    if command == "query-migrate-parameters":
        return {"max-bandwidth": 1 << 27}
    if command == "migrate-incoming":
        threading.Thread(target=load, args=(descriptors.pop(),), daemon=True).start()
    if command == "cont" and manner == "die":
        os._exit(1)
    return {}


send({"QMP": {"version": {}, "capabilities": []}})
while True:
    data, control, _, _ = client.recvmsg(65536, 64)
    if not data:
        break
    for _, _, rights in control:
        descriptors += array.array("i", rights)
    request = json.loads(data)
    if request["execute"] == "cont" and manner == "refuse":
        send({"error": {"class": "GenericError", "desc": "will not"}, "id": request["id"]})
    else:
        send({"return": execute(request["execute"]), "id": request["id"]})
threading.Event().wait()
