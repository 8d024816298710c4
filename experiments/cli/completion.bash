# Tab completion of `python -m experiments.bench`, `compare` and `diverge`, whose options Hydra knows: source experiments/cli/completion.bash
# What Hydra installs itself completes the commands tandem-bench and so on, and scripts, but no `-m`.
_tandem_options() {
    [[ ${COMP_LINE:0:COMP_POINT} =~ \ -m\ +(experiments\.(bench|compare|diverge))\ +(.*)$ ]] || return
    local module=${BASH_REMATCH[1]} given=${BASH_REMATCH[3]}
    local word=${given##* } choices
    choices=$(COMP_LINE="tandem $given" "$1" -m "$module" -sc query=bash 2>/dev/null) || return
    compopt -o nospace 2>/dev/null  # a value or a further part of the name follows
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    if [[ $COMP_WORDBREAKS == *=* ]]; then  # readline replaces only what stands behind the last of them
        COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    fi
}
complete -o default -F _tandem_options python python3
