import json
from support import raw
from support.lines import plain
def test_v1_request(alike):
    def go(stage):
        stage.app.conf.task_protocol = 1
        w = stage.worker(app="semantics", conf={"task_protocol": 1})
        a = stage.app.send_task("states.everything", (1, "z"), {"a": {"b": 1}}, shadow="x", time_limit=50, group_id="g", group_index=1, root_id="r", headers={"h": 1}).get(timeout=30)
        a["seen"] = {k: plain(v) for k, v in a["seen"].items() if k not in ("origin", "hostname", "reply_to", "correlation_id")}
        a["log"] = [plain(l.split("] ")[1]) for l in w.log.splitlines() if "received" in l]
        return a
    alike(go)
