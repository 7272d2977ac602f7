# What the shell of a page has beside its own commands. A server is started behind the page and
# waited for; one that ran before is ended first, as its reader would.

end_server() {
    if [ -f "$HERE/server.pid" ]; then
        kill -TERM "$(cat "$HERE/server.pid")" 2>/dev/null || true
        while kill -0 "$(cat "$HERE/server.pid")" 2>/dev/null; do sleep 0.05; done
        rm "$HERE/server.pid"
    fi
}

python() {
    if [ "${1-} ${2-}" = "-m serving" ] && [[ " $* " != *" --print-config "* ]]; then
        end_server
        command python "$@" --address-file "$HERE/server.json" >/dev/null 2>"$HERE/server.log" &
        echo $! >"$HERE/server.pid"
        until [ -s "$HERE/server.json" ]; do
            kill -0 $! 2>/dev/null || { cat "$HERE/server.log" >&2; return 1; }
            sleep 0.05
        done
    else
        command python "$@"
    fi
}

kan-client() { # asks the page's server, unless it is told another
    case " $* " in
        *" --address "*) command kan-client "$@" ;;
        *) command kan-client "$@" --address "127.0.0.1:$KANSERVE_GRPC_PORT" ;;
    esac
}
