# The interpreter for amd64. See the package comment for what it does.
# rbp: buffer, rbx: current record, r12: where to read to, r13: where to stop.
	.intel_syntax noprefix
	.text
	.globl _start
_start:
	mov	ebp, 0x20000000
loop:
	mov	r12, rbp
	lea	r13, [rbp+32]
	call	readfull
	mov	r13, [rbp]
	call	readfull
	mov	rbx, [rbp+8]
next:
	cmp	rbx, [rbp+16]
	jae	done
	xor	ecx, ecx
arg:
	mov	rdx, [rbx+8+rcx*8]
	mov	rax, [rbx+56]
	bt	rax, rcx
	jnc	direct
	movsxd	rdx, dword ptr [rdx]
direct:
	mov	[rbp-64+rcx*8], rdx
	inc	ecx
	cmp	ecx, 6
	jb	arg
	mov	rdi, [rbp-64]
	mov	rsi, [rbp-56]
	mov	rdx, [rbp-48]
	mov	r10, [rbp-40]
	mov	r8, [rbp-32]
	mov	r9, [rbp-24]
	mov	rax, [rbx]
	syscall
	mov	[rbx+72], rax
	test	rax, rax
	jnz	nonzero
	mov	rcx, [rbx+80]
	test	rcx, rcx
	jz	advance
	mov	rbx, rcx
	jmp	next
nonzero:
	cmp	rax, -11
	jne	failed
	mov	rdx, [rbx+56]
	bt	rdx, 63
	jc	next
failed:
	cmp	rax, -4095
	jb	advance
	mov	rcx, rax
	neg	rcx
	cmp	rcx, 63
	ja	report
	mov	rdx, [rbx+64]
	bt	rdx, rcx
	jnc	report
advance:
	add	rbx, 88
	jmp	next
done:
	xor	eax, eax
report:
	mov	[rbp], rbx
	mov	[rbp+8], rax
	mov	rcx, [rbp+24]
	test	rcx, rcx
	jz	write
	mov	rcx, [rcx]
write:
	mov	[rbp+16], rcx
	mov	edi, 3
	mov	rsi, rbp
	mov	edx, 24
	mov	eax, 1
	syscall
	jmp	loop
readfull:
	cmp	r12, r13
	jae	full
	mov	edi, 3
	mov	rsi, r12
	mov	rdx, r13
	sub	rdx, r12
	xor	eax, eax
	syscall
	test	rax, rax
	jle	exit
	add	r12, rax
	jmp	readfull
full:
	ret
exit:
	mov	edi, 125
	mov	eax, 231
	syscall
