#!/usr/bin/env bash
# Two hosts on this machine: network namespaces joined by a cable, each with its own name and an sshd. Needs root,
# iproute2 and openssh-server (pdsh for those who want it).
#   two_hosts.sh up FOLDER ID     makes them; FOLDER/on nodea COMMAND runs a command there, FOLDER/bin/ssh reaches them
#   two_hosts.sh down FOLDER ID   ends everything in them and takes them away
# ID: a few letters or digits, so that several pairs can live side by side. The cable is ID-a in nodea, ID-b in nodeb:
# `ip -n ID-nodeb link set eth0 down` cuts it.
set -euo pipefail
action=$1 folder=$(realpath -m "$2") id=$3

down() {
    local node pids
    for node in nodea nodeb; do
        [[ -e /run/netns/$id-$node ]] || continue
        for signal in TERM KILL; do
            pids=$(ip netns pids "$id-$node")
            [[ -z "$pids" ]] || kill -$signal $pids 2>/dev/null || true
            [[ -z "$pids" ]] || sleep 0.3
        done
        ip netns delete "$id-$node"
    done
}

up() {
    mkdir -p "$folder/bin" "$folder/ssh" /run/sshd
    chmod 755 "$folder"
    printf '127.0.0.1 localhost\n10.77.0.1 nodea\n10.77.0.2 nodeb\n' >"$folder/hosts"
    ip netns add "$id-nodea"
    ip netns add "$id-nodeb"
    ip link add eth0 netns "$id-nodea" type veth peer name eth0 netns "$id-nodeb"
    local last=1 node
    for node in nodea nodeb; do
        ip -n "$id-$node" address add 10.77.0.$last/24 dev eth0
        ip -n "$id-$node" link set lo up
        ip -n "$id-$node" link set eth0 up
        last=$((last + 1))
    done
    # Not `ip netns exec`, which mounts another /sys: Slurm needs the cgroups in this one.
    cat >"$folder/on" <<END
#!/bin/sh
node=\$1
shift
exec nsenter --net=/run/netns/$id-\$node unshare --uts --mount sh -c \\
    'hostname "\$0" && mount --bind "$folder/hosts" /etc/hosts && exec "\$@"' \\
    "\$node" env PATH="$folder/bin:\$PATH" "\$@"
END
    printf '#!/bin/sh\nexec %s -F "%s" "$@"\n' "$(command -v ssh)" "$folder/ssh/config" >"$folder/bin/ssh"
    chmod +x "$folder/on" "$folder/bin/ssh"
    chmod 700 "$folder/ssh"
    ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/hostkey"
    ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/id"
    cp "$folder/ssh/id.pub" "$folder/ssh/authorized_keys"
    cat >"$folder/ssh/sshd_config" <<END
Port 22
HostKey $folder/ssh/hostkey
AuthorizedKeysFile $folder/ssh/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
PidFile none
END
    cat >"$folder/ssh/config" <<END
Host *
    User root
    IdentityFile $folder/ssh/id
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
END
    for node in nodea nodeb; do
        setsid "$folder/on" $node "$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f "$folder/ssh/sshd_config" \
            >"$folder/sshd-$node.log" 2>&1 </dev/null &
    done
    for node in nodea nodeb; do
        for attempt in {1..50}; do
            "$folder/on" nodea ssh -oConnectTimeout=2 $node true 2>/dev/null && break
            [[ $attempt -lt 50 ]] || { echo "two_hosts.sh: $node does not answer, see $folder/sshd-$node.log" >&2; exit 1; }
            sleep 0.1
        done
    done
}

"$action"
